"""What a run goes on from: a whole checkpoint, and everything that it began with, by content."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.analysis.runs import read_runs
from ultrafuser.gating.commands.run_folder import RUN_FOLDER
from ultrafuser.gating.errors import CommandError, TrainError
from ultrafuser.gating.files import MAX_HASHED_BYTES, content_digest
from ultrafuser.gating.model.cache import Artifact, build_once
from ultrafuser.gating.training.checkpoints import CONTENTS_FILE, newest_whole
from ultrafuser.gating.training.command import train
from ultrafuser.gating.training.origins import check_resumed, describe_origins


@pytest.fixture
def trained(run, tmp_path) -> Path:
    """The folder of a run of two steps with a checkpoint after each, on data of its own."""
    shutil.copy(CONVERSATIONS, tmp_path / "rows.jsonl")
    return run(stage=1, steps=2, save_every=1, data=[str(tmp_path / "rows.jsonl")]).parent


def test_a_run_goes_on_with_its_data_wherever_they_are_and_not_with_others(trained, settings_of, tmp_path):
    rows, moved = tmp_path / "rows.jsonl", tmp_path / "elsewhere" / "renamed.jsonl"
    moved.parent.mkdir()
    rows.rename(moved)
    options = {"stage": 1, "steps": 2, "save_every": 1, "resume": True}
    assert train(settings_of(**options, data=[str(moved)])) == trained / "fusion.yaml"
    rows.write_bytes(CONVERSATIONS.read_bytes().replace(b"content", b"content ", 1))
    with pytest.raises(TrainError, match=r"^--data: rows\.jsonl has another content than rows\.jsonl had in the run"):
        train(settings_of(**options, data=[str(rows)]))
    with pytest.raises(TrainError, match=r"^--data: the run to resume had 1 files, now there are 2;"):
        train(settings_of(**options, data=[str(moved), str(moved)]))
    with pytest.raises(TrainError, match=r"^--data: renamed\.jsonl was of domain None, now of 'text';"):
        train(settings_of(**options, data=[f"text={moved}"]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_checkpoint_that_is_cut_off_is_named_and_the_whole_one_before_it_is_taken(
    trained, settings_of, tmp_path, capsys
):
    folder = trained / RUN_FOLDER
    cut(folder / "checkpoint-2" / "trained.safetensors")
    options = {"stage": 1, "steps": 2, "save_every": 1, "data": [str(tmp_path / "rows.jsonl")], "resume": True}
    assert train(settings_of(**options)) == trained / "fusion.yaml"
    said = capsys.readouterr().err
    assert "checkpoint-2: trained.safetensors has " in said
    assert "; going on from checkpoint-1\n" in said
    assert newest_whole(folder) == (folder / "checkpoint-2", []), "it was made anew"
    assert (folder / "damaged-checkpoint-2").is_dir()
    for checkpoint in folder.glob("checkpoint-*"):
        cut(checkpoint / "provenance.json")
    with pytest.raises(TrainError, match=r"^--resume: checkpoint-2: provenance\.json has .*, and no checkpoint in "):
        train(settings_of(**options))


@pytest.mark.parametrize("is_noted", [True, False])
def test_whatever_of_a_checkpoint_is_cut_off_is_found(trained, is_noted):
    folder = trained / RUN_FOLDER
    newest = folder / "checkpoint-2"
    needed = {"trained.safetensors", "optimizer.pt", "scheduler.pt", "provenance.json", "trainer_state.json"}
    assert needed < {path.name for path in newest.iterdir()}
    if not is_noted:
        (newest / CONTENTS_FILE).unlink()
    for name in needed:
        whole = (newest / name).read_bytes()
        for part in (whole[: len(whole) // 2], b""):
            (newest / name).write_bytes(part)
            found, damages = newest_whole(folder)
            assert found == folder / "checkpoint-1"
            assert damages[0].startswith(f"checkpoint-2: {name} ")
        (newest / name).write_bytes(whole)
    assert newest_whole(folder) == (newest, [])


def test_curves_of_a_run_are_those_of_its_newest_log_that_is_whole(tmp_path, capsys):
    for step in (1, 2):
        path = tmp_path / RUN_FOLDER / f"checkpoint-{step}" / "trainer_state.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"log_history": [{"step": 1, "loss": 3.0}] * step}))
    cut(path)
    assert read_runs([str(tmp_path)])[0].loss.steps == [1]
    assert "checkpoint-2/trainer_state.json: not JSON" in capsys.readouterr().err
    cut(tmp_path / RUN_FOLDER / "checkpoint-1" / "trainer_state.json")
    with pytest.raises(CommandError, match=r"^--run: .*/trainer_state\.json: not JSON .*; name another folder$"):
        read_runs([str(tmp_path)])


@pytest.fixture
def fusion(tiny_copy: Path) -> Path:
    """A fusion whose second specialist has an adapter and a template of its own."""
    (tiny_copy.parent / "own.jinja").write_text("{{ messages[0].content }}")
    (tiny_copy.parent / "adapter").mkdir()
    (tiny_copy.parent / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    content = yaml.safe_load(tiny_copy.read_text())
    content["specialists"][1] |= {"adapter": "./adapter", "chat_template": "own.jinja"}
    tiny_copy.write_text(yaml.safe_dump(content))
    return tiny_copy


def other(name: str, content: bytes = b"others") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def renamed(folder: Path) -> None:
    path = folder / "fusion.yaml"
    path.write_text(path.read_text().replace("name: math", "name: maths"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (other("own.jinja"), r"the chat template of 'code' is not what the run to resume began with; put back"),
        (other("adapter/adapter_model.safetensors"), r"the adapter of 'code' \(adapter_model\.safetensors\) is not"),
        (other("adapter/more.safetensors"), r"the adapter of 'code' \(more\.safetensors\) is not"),
        (other("text/config.json"), r"the model of 'text' \(config\.json\) is not"),
        (other("math/model.safetensors"), r"the model of 'math' \(model\.safetensors\) is not"),
        (other("math/tokenizer.json"), r"the model of 'math' \(tokenizer\.json\) is not"),
        (other("gate.safetensors"), r"its gate is not what the run to resume began with"),
        (renamed, r"the run to resume had text, code, math, now text, code, maths;"),
    ],
)
def test_a_run_goes_on_with_the_fusion_that_it_began_with(fusion, settings_of, tmp_path, change, complaint):
    settings = settings_of(stage=1, fusion=str(fusion))
    provenance = json.loads(json.dumps({"lasting": settings.lasting(), "origins": describe_origins(settings)}))
    moved = tmp_path / "moved"
    shutil.copytree(fusion.parent, moved)
    for note in ("README.md", ".git/HEAD", ".cache/huggingface/download/config.json.metadata"):
        (moved / "text" / note).parent.mkdir(parents=True, exist_ok=True)
        (moved / "text" / note).write_text("what is written about a model is not the model")
    now = settings_of(stage=1, fusion=str(moved))
    check_resumed(provenance, now, describe_origins(now))
    change(moved)
    with pytest.raises(TrainError, match=f"^fusion: {complaint}"):
        check_resumed(provenance, now, describe_origins(now))


@pytest.mark.parametrize(
    ("before", "now", "complaint"),
    [
        (["a/b", None, "A"], ["a/b", "A", "A"], None),
        (["a/b", "v1", "A"], ["a/b", None, "A"], None),
        (["a/b", None, None], ["a/b", None, "A"], None),
        (["a/b", None, None], ["a/b", None, None], None),
        (["a/b", None, "A"], ["a/b", None, "B"], "the model of 'text' is not what the run to resume began with; put"),
        (["a/b", "A", "A"], ["a/c", "A", "A"], "the model of 'text' is not what"),
        (["a/b", "A", "A"], {"config.json": "0"}, "the model of 'text' is not what"),
        (["a/b", None, None], ["a/b", "A", "A"], "the model of 'text' is not what"),
        (["a/b", "v1", "A"], ["a/b", "v1", None], "the commit of the model of 'text' cannot be found out, .* with A;"),
    ],
)
def test_a_hubs_model_is_the_same_if_its_commit_is(fusion, settings_of, before, now, complaint):
    settings = settings_of(stage=1, fusion=str(fusion))
    origins = describe_origins(settings)

    def of(model: object) -> dict[str, object]:
        own = origins["specialists"]
        return origins | {"specialists": own | {"text": own["text"] | {"model": model}}}

    provenance = {"lasting": settings.lasting(), "origins": of(before)}
    if complaint is None:
        check_resumed(provenance, settings, of(now))
    else:
        with pytest.raises(TrainError, match=f"^fusion: {complaint}"):
            check_resumed(provenance, settings, of(now))


def test_large_weights_are_known_by_pieces_of_their_content_and_not_by_their_time(tmp_path):
    path, copy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    size = MAX_HASHED_BYTES + 12_345
    with path.open("wb") as file:  # a hole of zeros: no disk is filled
        file.truncate(size)
    shutil.copyfile(path, copy)
    assert content_digest(path) == content_digest(copy)
    for begin, length in ((0, 1), (size - 1, 1), (size // 2, size // 1000)):
        with copy.open("r+b") as file:
            file.seek(begin)
            file.write(b"x" * length)
        assert content_digest(path) != content_digest(copy), begin
        shutil.copyfile(path, copy)


def test_what_is_damaged_in_the_cache_is_built_anew(tmp_path):
    built = []

    def build(folder: Path, tick: object) -> None:
        built.append(folder)
        (folder / "states.bin").write_bytes(b"whole")

    artifact = Artifact("states", "states", {"a": 1}, build)
    folder = build_once(artifact, tmp_path, lambda label, share: None)
    for damage in (lambda path: path.write_bytes(b"who"), lambda path: path.unlink()):
        assert build_once(artifact, tmp_path, lambda label, share: None) == folder
        damage(folder / "states.bin")
        assert not artifact.is_built(tmp_path)
        build_once(artifact, tmp_path, lambda label, share: None)
        assert (folder / "states.bin").read_bytes() == b"whole"
    assert len(built) == 3
