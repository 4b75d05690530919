"""Settings of a command in a YAML file: by the names of the flags, which win; a mistake names its key."""

from pathlib import Path

import pytest

from ultrafuser.gating.commands.config_file import read_config, write_config
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.training.settings import TrainSettings, parse_settings

WHOLE = """\
fusion: demo
data: [a.jsonl, "hub:org/name@main,config=c"]
output: out
stage: 1
steps: 4K
learning-rate: 1e-3
cache-states: true
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_a_file_says_all_that_a_command_line_does(config: Path) -> None:
    config.write_text(WHOLE)
    settings = parse_settings(["--config", str(config)], cache="/c")
    assert settings.data == ("a.jsonl", "hub:org/name@main,config=c")
    assert (settings.fusion, settings.steps, settings.learning_rate, settings.cache) == ("demo", 4096, 1e-3, "/c")
    assert (settings.cache_states, settings.warmup_steps) == (True, 0)


def test_what_the_command_line_says_wins(config: Path) -> None:
    config.write_text(WHOLE + "cache: /mine\n")
    argv = ["other", "--data", "b", "c", "--no-cache-states", f"--config={config}", "--steps", "3"]
    settings = parse_settings(argv, cache="/c")
    assert (settings.fusion, settings.data, settings.steps) == ("other", ("b", "c"), 3)
    assert (settings.cache_states, settings.cache, settings.output) == (False, "/mine", "out")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("learning_rate: 1.0", "'learning_rate' is no setting; did you mean learning-rate?"),
        ("config: other.yaml", "'config' is no setting; "),
        ("3: 4", "3 is no setting; see --help for the flags, whose names are the keys"),
        ("steps: fast", "steps: Input should be a valid integer, unable to parse string as an integer, got 'fast'"),
        ("steps: 1.5", "steps: Input should be a valid integer, got 1.5; change the value"),
        ("steps: 0", "steps: Input should be greater than or equal to 1, got 0"),
        ("steps: true", "steps: takes no true; change the value"),
        ("stage: true", "stage: takes no true; change the value"),
        ("stage: '1'", "stage: Input should be 1 or 2, got '1'"),
        ("cache-states: 'yes'", "cache-states: Input should be a valid boolean, got 'yes'"),
        ("data: a.jsonl", "data: Input should be a valid list, got 'a.jsonl'"),
        ("data: [1]", "data: Input should be a valid string, got [1]"),
        ("seed: null", "seed: Input should be a valid integer, got None"),
        ("learning-rate: .inf", "learning-rate: Input should be a finite number, got inf"),
        ("gate-kind: fancy", "gate-kind: unknown gate kind 'fancy'; use paper, or "),
        ("[steps]", "is no mapping; write one setting a line, as learning-rate: 0.001"),
        ("", "is no mapping; "),
        ("steps: 1\nsteps: 2", "not usable as YAML (line 2: 'steps' is given twice, first in line 1)"),
    ],
)
def test_mistakes_are_one_line_that_names_file_and_key(config: Path, content: str, complaint: str) -> None:
    config.write_text(content)
    with pytest.raises(CommandError) as caught:
        parse_settings(["demo", "--config", str(config), "--data", "a", "--output", "o", "--stage", "1"])
    assert str(caught.value).startswith(f"--config: {config}: {complaint}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--config"], "argument --config: expected one argument"),
        (["--config", "/none.yaml"], "/none.yaml: no such file; name a YAML file of settings"),
        (["--config", "{config}"], "the following arguments are required: FUSION, --output"),
        (["demo", "--config", "{config}", "--output", "o", "--drafter"], "--stage: name either a stage"),
    ],
)
def test_what_is_missing_or_does_not_go_together_is_told_as_without_a_file(
    config: Path, argv: list[str], complaint: str
) -> None:
    config.write_text("data: [a]\nstage: 1\n")
    with pytest.raises(CommandError) as caught:
        parse_settings([item.format(config=config) for item in argv])
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--stage", "1", "--cache-states", "--gate-kind", "scaled+joint", "--eval-data", "e", "--eval-every", "7"],
        ["--stage", "2", "--learn", "full", "--report-to", "wandb", "mlflow", "--domains", "a", "b"],
        ["--specialist", "code", "--lora-rank", "4"],
        ["--drafter", "--draft-window", "64"],
        ["--add", "law=models/law", "--eval-data", "e", "--early-stopping-patience", "3", "--eval-every", "1"],
    ],
)
def test_settings_that_were_written_are_read_back(config: Path, argv: list[str]) -> None:
    settings = parse_settings(["démo", *argv, "--data", "a", "b=c", "--output", "o", "--learning-rate", "1e-5"])
    write_config(config, settings.as_config())
    assert read_config(str(config), TrainSettings).items() >= {"fusion": "démo", "learning_rate": 1e-5}.items()
    back = parse_settings(["--config", str(config)])
    assert back == settings.model_copy(update={"config": str(config)})
    assert back.lasting() == settings.lasting()
