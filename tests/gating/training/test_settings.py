"""The command line of `ultrafuser train`: every setting is a flag, mistakes are one line, help needs no torch."""

import subprocess
import sys

import pytest

from ultrafuser.gating.commands.flags import build_parser
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.training.settings import TrainSettings, parse_settings

REQUIRED = ["demo", "--data", "a.jsonl", "b.jsonl", "--output", "out"]


def test_flags_become_settings_and_the_rest_has_the_papers_values():
    settings = parse_settings([*REQUIRED, "--stage", "1", "--learning-rate", "1e-3", "--cache-states"])
    assert settings.data == ("a.jsonl", "b.jsonl")
    assert (settings.stage, settings.learning_rate, settings.cache_states) == (1, 1e-3, True)
    assert (settings.num_steps, settings.num_rows_per_domain) == (400, 64)
    second = parse_settings([*REQUIRED, "--stage", "2"])
    assert (second.num_steps, second.num_rows_per_domain, second.learning_rate) == (5000, 32, 2e-5)


def test_every_setting_is_a_flag_with_a_help_text():
    parser = build_parser(TrainSettings, prog="p", usage="", description="", positional="fusion")
    actions = {action.dest: action for action in parser._actions}
    assert set(TrainSettings.model_fields) == set(actions) - {"help"}
    assert all(action.help for action in actions.values())


def test_a_draft_head_has_the_defaults_that_the_help_says(capsys):
    settings = parse_settings([*REQUIRED, "--drafter"])
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (settings.num_steps, settings.num_rows_per_domain) == (5000, 32)
    assert "400 in stage 1; else, a draft head's too, 5000" in said
    assert "64 in stage 1; else, a draft head's too, 32" in said


def test_the_cache_folder_of_the_caller_is_the_default():
    assert parse_settings([*REQUIRED, "--stage", "1"], cache="/c").cache == "/c"
    assert parse_settings([*REQUIRED, "--stage", "1", "--cache", "/d"], cache="/c").cache == "/d"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["demo", "--data", "a", "--stage", "1"], "the following arguments are required: --output"),
        (["demo", "--output", "o", "--stage", "1"], "the following arguments are required: --data"),
        (REQUIRED, "--stage: name either a stage"),
        ([*REQUIRED, "--stage", "3"], "invalid choice: 3"),
        ([*REQUIRED, "--stage", "1", "--steps", "0"], "--steps: Input should be greater than or equal to 1, got '0'"),
        ([*REQUIRED, "--stage", "1", "--learning-rate", "fast"], "--learning-rate: Input should be a valid number"),
        ([*REQUIRED, "--stage", "1", "--epochs", "3"], "unrecognized arguments: --epochs 3"),
        ([*REQUIRED, "--stage", "2", "--cache-states"], "--cache-states: only stage 1 can cache"),
        ([*REQUIRED, "--drafter", "--cache-states"], "--cache-states: only stage 1 can cache"),
        ([*REQUIRED, "--drafter", "--stage", "1"], "--stage: name either a stage"),
        ([*REQUIRED, "--drafter", "--specialist", "text"], "--stage: name either a stage"),
        (
            [*REQUIRED, "--drafter", "--fresh-gate"],
            "--fresh-gate: a draft head is trained for the gate that the fusion",
        ),
        (
            [*REQUIRED, "--drafter", "--gate-kind", "joint"],
            "--gate-kind: a draft head is trained for the gate that the fusion",
        ),
        (
            [*REQUIRED, "--specialist", "code", "--gate-kind", "joint"],
            "--gate-kind: a specialist alone is trained without a gate",
        ),
        (
            [*REQUIRED, "--stage", "1", "--gate-kind", "joint+fancy"],
            "--gate-kind: unknown gate kind 'joint+fancy'; use paper, or one or more of joint, probabilities, scaled,",
        ),
        *(
            ([*REQUIRED, "--drafter", *flag], f"{flag[0]}: does nothing beside --drafter, as only the head learns")
            for flag in (
                ["--learn", "lora"],
                ["--lora-rank", "4"],
                ["--lora-alpha", "4"],
                ["--lora-dropout", "0.1"],
                ["--gate-learning-rate", "1e-3"],
                ["--gradient-checkpointing"],
            )
        ),
        (
            [*REQUIRED, "--specialist", "code", "--learn", "full"],
            "--learn: a specialist alone is trained by an adapter",
        ),
        *(
            (
                [*REQUIRED, "--stage", "1", "--early-stopping-patience", "2", *flags],
                "--early-stopping-patience: it counts",
            )
            for flags in ([], ["--eval-data", "e"], ["--eval-every", "5"])
        ),
        ([*REQUIRED, "--stage", "1", "--report-to", "none", "wandb"], "--report-to: none stands alone; leave it"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(argv, complaint):
    with pytest.raises(CommandError) as caught:
        parse_settings(argv)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_must_not_change_on_resume_is_all_but_where_and_how_often():
    settings = parse_settings([*REQUIRED, "--stage", "1"])
    free = set(TrainSettings.model_fields) - set(settings.lasting())
    assert free == {"config", "resume", "plan", "cache", "output", "keep_checkpoints", "log_every", "report_to"}


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from ultrafuser.gating.training.command import parse_settings\n"
        "try: parse_settings(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: ultrafuser train FUSION")
    assert done.stdout.strip().endswith("set()"), done.stdout[-300:] + done.stderr


def test_a_flag_named_twice_adds_to_what_it_had():
    argv = ["demo", "--data", "a", "b", "--data", "c", "--output", "o", "--stage", "1"]
    assert parse_settings(argv).data == ("a", "b", "c")
