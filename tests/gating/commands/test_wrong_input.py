"""What a user mistypes is one line, in all commands alike, before any work: numbers, addresses, places to write to."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from pydantic import BaseModel

from ultrafuser.gating.analysis.command import AnalysisSettings
from ultrafuser.gating.commands.address import check_endpoint
from ultrafuser.gating.commands.flags import flag_of, resolve
from ultrafuser.gating.errors import CommandError, DataError, EndpointError, FusionError, UserError
from ultrafuser.gating.evaluation.settings import EvalSettings
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.synthesis.settings import ExportSettings, MakeSettings, MapSettings
from ultrafuser.gating.training.settings import TrainSettings
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main
from ultrafuser.server.engine_options import EngineOptions
from ultrafuser.server.settings import ServerSettings

REQUIRED: dict[type[BaseModel], dict[str, Any]] = {
    TrainSettings: {
        "fusion": "demo",
        "data": ["a.jsonl"],
        "output": "o",
        "stage": 1,
        "eval_data": ["b.jsonl"],
        "eval_every": 1,  # without these two there is no early stopping
    },
    EvalSettings: {"fusion": "demo", "loss": True, "data": ["a.jsonl"]},
    AnalysisSettings: {"run": ["r"], "output": "o"},
    MakeSettings: {"output": "o", "domain": ["text"], "prompt_price": "1"},
    ExportSettings: {"output": "o"},
    MapSettings: {"output": "o", "fusion": "demo"},
    ServerSettings: {},
    EngineOptions: {},
}
NUMBERS = (
    "-1",
    "0",
    "1",
    "5000000000",
    str(10**20),
    "9" * 5000,
    "9" * 400 + "G",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "1e-400",
    "x",
)


def numeric_fields() -> Iterator[tuple[type[BaseModel], str]]:
    for model in REQUIRED:
        for name, field in model.model_fields.items():
            kinds = [field.annotation, *(getattr(kind, "__origin__", kind) for kind in get_args(field.annotation))]
            if int in kinds or float in kinds:
                yield model, field.alias or name


@pytest.mark.parametrize(("model", "name"), list(numeric_fields()))
def test_a_number_is_taken_if_it_makes_sense_or_refused_by_its_flag(model: type[BaseModel], name: str) -> None:
    taken, refusals = {}, []
    for text in NUMBERS:
        try:
            taken[text] = getattr(resolve(model, REQUIRED[model] | {name: text}), name)
        except CommandError as error:
            refusals.append(str(error))
    assert taken, "no number at all is taken"
    assert all(map(math.isfinite, taken.values()))
    assert not {"nan", "inf", "x", "9" * 5000} & taken.keys()
    for refusal in refusals:
        assert refusal.startswith(f"{flag_of(name)}: ")
        assert "\n" not in refusal
        assert len(refusal) < 300


@pytest.mark.parametrize("model", [model for model in REQUIRED if "seed" in model.model_fields])
@pytest.mark.parametrize("seed", ["-1", "5000000000"])
def test_a_seed_is_refused_with_its_range(model: type[BaseModel], seed: str) -> None:
    with pytest.raises(CommandError, match=rf"^--seed: .*, got '{seed}'; give 0 to 4294967295$"):
        resolve(model, REQUIRED[model] | {"seed": seed})


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("engine: {seed: -1}", "engine.seed"),
        ("engine: {max_model_len: 100000000000000000000}", "engine.max_model_len"),
        ("sampling_defaults: {temperature: .nan}", "sampling_defaults.temperature"),
        ("sampling_defaults: {temperature: .inf}", "sampling_defaults.temperature"),
        ("engine: {seed: 1, seed: 2}", "not a YAML file: line 4: 'seed' is given twice"),
    ],
)
def test_a_fusion_files_numbers_and_keys_are_held_to_the_same(line: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "fusion.yaml"
    path.write_text(f"name: x\nspecialists: [{{name: a, model: a/b}}]\neos_token_ids: [2]\n{line}\n")
    with pytest.raises(FusionError, match=key) as caught:
        load_fusion(path)
    assert "\n" not in str(caught.value)


ADDRESSES = (
    "http://127.0.0.1:99999/v1", "http://127.0.0.1:0/v1", "http://127.0.0.1:-1/v1", "http://host:port/v1", "ftp://host/v1",
    "127.0.0.1:8000", "", "http://", "http:///v1", "http://[::1", "http://[zz]:1/v1", "http://a b/v1", " http://a/v1",
    "http://a/v1\n", "http://a\x01/v1", "http://user:secret@host/v1", "http://1.2.3.999/v1", "http://..a/v1",
    f"http://{'a' * 70}/v1", "http://host/v1?key=1", "http://host/v1#x",
)  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("command", ["eval --benchmark gsm8k=none --output PLACE", "data make PLACE --domain text"])
def test_an_address_that_cannot_be_asked_is_one_line_before_anything_is_written(
    command: str, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = command.replace("PLACE", str(output)).split()
    assert main([*arguments, f"--base-url={address}"]) == EXIT_WRONG_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ultrafuser: --base-url: ")
    assert "is no address; give one such as http://127.0.0.1:8000/v1" in line
    assert "secret" not in line
    assert not output.exists()


@pytest.mark.parametrize(
    "address", ["http://localhost:8000/v1/", "https://x.example.org/a/v1", "http://[::1]:1/v1", "http://10.0.0.1/v1"]
)
def test_an_address_that_can_be_asked_is_one_for_the_client_too(address: str) -> None:
    check_endpoint(address, "key")
    assert httpx.URL(address).host


@pytest.mark.parametrize("key", ["clé", "a\nb", "\x00"])
def test_a_key_that_no_header_can_have_is_refused_unseen(key: str) -> None:
    with pytest.raises(EndpointError, match=r"^api_key: has characters that no header can have") as caught:
        check_endpoint("http://localhost/v1", key)
    assert key not in str(caught.value)


@pytest.fixture(params=["below a file", "cannot be made"])
def impossible(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return {"below a file": tmp_path / "file" / "out", "cannot be made": Path("/proc/ultrafuser/out")}[request.param]


OUTPUTS = {
    "train": "train FUSION --stage 1 --data none --output PLACE",
    "train, its cache": "train FUSION --stage 1 --data none --output o --cache PLACE",
    "eval, its file": "eval FUSION --loss --data none --json PLACE/losses.json",
    "eval, its variants": "eval FUSION --variants PLACE",
    "eval, of a benchmark": "eval --benchmark gsm8k=none --output PLACE",
    "eval, its cache": "eval FUSION --loss --data none --cache PLACE",
    "analyze": "analyze FUSION --data none --output PLACE",
    "data clean": "data clean PLACE --data none",
    "data make": "data make PLACE --domain text --base-url http://127.0.0.1:9/v1",
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_place_that_cannot_be_written_to_is_one_line_before_anything_is_read(
    command: str,
    impossible: Path,
    tiny_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = OUTPUTS[command].replace("FUSION", str(tiny_path)).replace("PLACE", str(impossible))
    assert main(line.split()) == EXIT_WRONG_INPUT
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert f"{impossible}: cannot be a folder (" in said


@pytest.mark.parametrize("command", [name for name in OUTPUTS if name.split(",")[0] in ("train", "eval", "analyze")])
def test_no_folder_is_left_of_a_command_whose_other_input_is_wrong(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ULTRAFUSER_CACHE", "cache")
    line = OUTPUTS[command].replace("FUSION", "none.yaml").replace("PLACE", "new/out")
    assert main(line.split()) == EXIT_WRONG_INPUT
    assert "none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_data_set_that_cannot_be_written_is_one_line_before_test_sets_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "dataset").write_text("a file")
    assert main(["data", "export", str(tmp_path), "--test-set", "none"]) == EXIT_WRONG_INPUT
    assert "dataset: cannot be a folder (" in capsys.readouterr().err


def test_a_folder_in_the_place_of_a_file_is_not_replaced_by_it(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was in the folder was once deleted."""
    (tmp_path / "precious").mkdir()
    command = ["eval", str(tiny_path), "--loss", "--data", "none", "--json", str(tmp_path / "precious")]
    assert main([*command, "--cache", str(tmp_path / "cache")]) == EXIT_WRONG_INPUT
    assert "--json: " in capsys.readouterr().err
    assert (tmp_path / "precious").is_dir()


@pytest.mark.parametrize("name", ["x" * 5000, ".", "none.jsonl", "~nobody-here/rows.jsonl", "a\x00b"])
def test_a_name_that_is_no_file_is_one_line_wherever_a_file_is_named(name: str) -> None:
    from ultrafuser.gating.data.conversations import DataFile
    from ultrafuser.gating.data.decontamination import TestSet
    from ultrafuser.gating.evaluation.benchmarks.benchmarks import BenchmarkFile
    from ultrafuser.gating.synthesis.stages.domain import load_domain

    for read in (DataFile.parse, lambda name: BenchmarkFile.parse(f"gsm8k={name}"), TestSet.parse):
        with pytest.raises(DataError, match=r"is no file|no such (data )?file"):
            read(name)
    for load in (load_domain, load_fusion):
        with pytest.raises(UserError):
            load(name)


def test_a_domain_is_not_called_like_a_result_of_all_domains(tmp_path: Path) -> None:
    from tests.gating.synthesis.runs import write_domain
    from ultrafuser.gating.data.conversations import DataFile, check_row
    from ultrafuser.gating.synthesis.stages.domain import load_domain

    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"^domain: 'mean' is the name of a result of all domains; choose another"):
        DataFile.parse(f"mean={tmp_path / 'a.jsonl'}")
    with pytest.raises(DataError, match=r"^domain: 'mean' is the name"):
        check_row({"domain": "mean", "messages": []})
    with pytest.raises(UserError, match="name: 'mean' is the name"):
        load_domain(str(write_domain(tmp_path / "d.yaml", name="mean")))
