"""The command line: every option is there, help comes at once, and what is wrong is said in one line."""

import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest

import ultrafuser
from ultrafuser.gating.model.fusion import preset_names
from ultrafuser.gating.model.schema import EngineSettings
from ultrafuser.server.__main__ import main
from ultrafuser.server.cli import build_parser, parse_command
from ultrafuser.server.engine.shared.options import ALLOWED_ENGINE_OPTIONS
from ultrafuser.server.engine_options import EngineOptions
from ultrafuser.server.settings import ServerSettings, SettingsError
from ultrafuser.server.start.preparing import _check_tool_parser

pytestmark = pytest.mark.usefixtures("process_as_before")

NOT_FLAGS = {
    "shutdown_timeout",  # the server has its own: it waits for requests before it ends the engine
    "tokenizer_mode",  # the renderer reads Hugging Face tokenizers only
}


def help_text(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a help option prints."""
    with pytest.raises(SystemExit) as caught:
        parse_command(argv, {})
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_every_setting_and_engine_option_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text("serve", "--help", capsys=capsys)
    for name in [*ServerSettings.model_fields, *EngineOptions.model_fields]:
        if name != "fusion":
            assert f"--{name.replace('_', '-')} " in text.replace(",", " "), name


def test_the_help_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text("serve", "--help", capsys=capsys)
    assert [name for name in preset_names() if name not in text] == []


def test_the_flags_are_the_tested_engine_options() -> None:
    assert set(EngineOptions.model_fields) == ALLOWED_ENGINE_OPTIONS - NOT_FLAGS


def test_every_engine_setting_of_the_fusion_file_may_be_given() -> None:
    assert set(EngineSettings.model_fields) <= ALLOWED_ENGINE_OPTIONS


@pytest.mark.parametrize("flag", ["--help", "--enable-lora"])
def test_help_and_well_known_refusals_import_neither_vllm_nor_torch(flag: str) -> None:
    code = (
        "import sys\n"
        "from ultrafuser.server.cli import parse_command\n"
        f"try: parse_command(['serve', '{flag}'], {{}})\n"
        "except (SystemExit, ValueError): print('loaded:', {'vllm', 'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("loaded: set()\n")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    declared = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert help_text("--version", capsys=capsys) == f"ultrafuser {declared}\n"
    assert ultrafuser.__version__ == declared


def test_flags_become_settings_and_engine_options() -> None:
    argv = ["serve", "my.yaml", "--port", "9000", "--api-key", "a", "--api-key", "b", "--max-num-seqs", "4"]
    command = parse_command([*argv, "--no-enforce-eager"], {"ULTRAFUSER_SEED": "7"})
    assert (command.settings.fusion, command.settings.port) == ("my.yaml", 9000)
    assert [key.get_secret_value() for key in command.settings.api_key] == ["a", "b"]
    assert command.engine_options == {"max_num_seqs": 4, "enforce_eager": False, "seed": 7}


def test_nothing_given_leaves_the_fusion_file_in_charge() -> None:
    assert parse_command(["serve"], {}).engine_options == {}


@pytest.mark.parametrize(
    ("text", "number"), [("4096", 4096), ("4k", 4000), ("4K", 4096), ("1G", 1 << 30), ("1GiB", 1 << 30), ("1.5K", 1536)]
)
def test_numbers_take_suffixes(text: str, number: int) -> None:
    assert parse_command(["serve", "--max-model-len", text], {}).engine_options == {"max_model_len": number}


def test_numbers_of_the_servers_own_settings_take_suffixes_too() -> None:
    """The help says so of all numbers, but only the engine's took them."""
    command = parse_command(["serve", "--max-body-bytes", "1M"], {"ULTRAFUSER_MAX_ITEMS": "4K"})
    assert (command.settings.max_body_bytes, command.settings.max_items) == (1 << 20, 4096)


def test_underscores_are_as_good_as_dashes() -> None:
    assert parse_command(["serve", "--max_num_seqs=4"], {}).engine_options == {"max_num_seqs": 4}


def test_json_becomes_an_object() -> None:
    command = parse_command(["serve", "--structured-outputs-config", '{"backend": "xgrammar"}'], {})
    assert command.engine_options == {"structured_outputs_config": {"backend": "xgrammar"}}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--max-num-seqs", "0"], "--max-num-seqs: .*'0'"),
        (["serve", "--max-step-seconds", "inf"], "--max-step-seconds: .*'inf'"),
        (["serve", "--scheduling-policy", "lifo"], "--scheduling-policy: .*'lifo'"),
        (["serve", "--structured-outputs-config", "{"], "--structured-outputs-config: "),
        (["serve", "--max-model-length", "9"], "did you mean --max-model-len?"),
        (["serve", "--api-server-count", "2"], "--api-server-count: several frontend processes"),
        (["serve", "--pipeline-parallel-size", "2"], "--pipeline-parallel-size: pipeline parallelism is not fused"),
        (["serve", "--enable-expert-parallel"], "--enable-expert-parallel: expert parallelism is not fused"),
        (["serve", "--data-parallel-size=2"], "--data-parallel-size: data parallelism is not fused"),
        (["serve", "--speculative-config", "{}"], "--speculative-config: .*use --speculation"),
        (["serve", "--enable-lora"], "--enable-lora: LoRA requests are not fused"),
        (["serve", "--cpu-offload-gb", "4"], "--cpu-offload-gb: not tested with fused models"),
        (["serve", "--frobnicate"], "--frobnicate: vLLM has no such engine option"),
        (["serve", "one.yaml", "two.yaml"], "two.yaml: unexpected argument"),
        (["serve", "--port"], "--port: expected one argument"),
        (["bake"], "invalid choice: 'bake'"),
    ],
)
def test_a_wrong_argument_is_named_with_the_way_out(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        parse_command(argv, {})
    assert "\n" not in str(caught.value)


def test_the_parser_has_no_abbreviations() -> None:
    _, rest = build_parser().parse_known_args(["serve", "--por"])
    assert rest == ["--por"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "no-such-file.yaml"], "no-such-file.yaml: no such fusion file"),
        (["serve", "--port", "many"], "--port: "),
        (["serve", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_and_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ultrafuser: ")
    assert message in line


def test_a_port_in_use_is_found_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot listen on 127.0.0.1 port {port}: address already in use" in line
    assert "--port" in line


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ModuleNotFoundError("No module named 'vllm'", name="vllm"), "vLLM is not installed; install ultrafuser[cuda]"),
        (RuntimeError("vllm 0.31.0 is installed, but ..."), "vllm 0.31.0 is installed, but ..."),
    ],
)
def test_a_missing_or_wrong_vllm_is_one_line_and_status_2(
    failure: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch("ultrafuser.server.start.importing.import_module", side_effect=failure):
        assert main(["serve", "--port", "0"]) == 2
    *steps, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ultrafuser: {message}")
    assert len(steps) == 2


@pytest.mark.parametrize(
    ("parser", "auto", "message"),
    [
        ("hermess", None, "vLLM has no parser 'hermess'; it has"),
        ("mistral", None, "'mistral' is not supported, .* choose one of apertus, .*, hermes, .*"),
        (None, True, "there is no parser; name one"),
    ],
)
def test_tool_parsers_are_checked_before_weights_are_loaded(
    parser: str | None, auto: bool | None, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        _check_tool_parser(parser, auto)
    _check_tool_parser("hermes", True)
