"""A specialist that joins later: found in one command, held against the fusion as it was, its own numbers trained."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fakes import write_tiny_fusion
from tests.gating.examples import CONVERSATIONS
from tests.gating.training.runs import weights_of
from ultrafuser.gating.commands.run_folder import RUN_FOLDER
from ultrafuser.gating.data.batches import collate_rows
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.gate_file import load_gate, save_gate
from ultrafuser.gating.model.gate_kind import GateKind
from ultrafuser.gating.model.gate_seats import own_parts, widened
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.training.command import train
from ultrafuser.gating.training.inputs import gather_inputs
from ultrafuser.gating.training.settings import TrainSettings
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main

NAMES = ("text", "code", "math")
SIZES = (64, 64, 64)

Run = Callable[..., Path]


def write_law(folder: Path, *, hidden_size: int = 64, markers: Sequence[str] = ()) -> Path:
    """The fusion file of one specialist alone, called law."""
    return write_tiny_fusion(
        folder,
        names=("law",),
        num_layers=(2,),
        hidden_sizes=(hidden_size,),
        vocab_sizes=(324,),
        templates=("llama2",),
        gate="none",
        seed=7,
        markers=markers,
    )


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_law(tmp_path_factory.mktemp("law"))


@pytest.fixture
def add(run: Run) -> Run:
    """Trains with a newcomer; evaluates on the rows that it trains on."""

    def start(source: Path, **changes: Any) -> Path:
        return run(add=f"law={source}", eval_data=[str(CONVERSATIONS)], **changes)

    return start


def with_gate(path: Path, kind: GateKind) -> Path:
    """The fusion with a random gate of another kind."""
    gate = Gate(SIZES, width=32, kind=kind)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    save_gate(gate, path.parent / "gate.safetensors", NAMES)
    return path


def read_domain(path: Path, settings: TrainSettings, domain: str) -> tuple[Any, Tensor]:
    """What the reference makes of a domain's rows by a fusion, and where there are tokens [B, R]."""
    rows = gather_inputs(settings).rows
    batch = collate_rows([rows.dataset[index] for index in rows.indices(domain)])
    batch.pop("labels")
    with torch.no_grad():
        output = UltraFuserForCausalLM.from_fusion(load_fusion(path))(**batch)
    return output, output.labels != -100


def changed_gate(path: Path, before: Gate) -> dict[str, Tensor]:
    """Where a result's gate differs from another, by name."""
    after = load_file(path.parent / "gate.safetensors")
    changed = {name: after[name] != tensor for name, tensor in before.state_dict().items()}
    return {name: is_changed for name, is_changed in changed.items() if bool(is_changed.any())}


def test_what_train_specialist_has_made_joins_in_one_command(law: Path, add: Run, run: Run, tmp_path: Path) -> None:
    alone = run(fusion=str(law), specialist="law", output=str(tmp_path / "alone"), learning_rate=1e-2)
    path = add(alone.parent)
    fusion = load_fusion(path)
    assert fusion.specialist_names == (*NAMES, "law")
    (own,) = load_fusion(alone).specialists
    assert fusion.specialists[3].chat_template == own.chat_template
    assert fusion.specialists[3].model == own.model
    copied = path.parent / "adapters" / "law"
    assert fusion.specialists[3].adapter == str(copied)
    weights = "adapter_model.safetensors"
    assert (copied / weights).read_bytes() == (Path(str(own.adapter)) / weights).read_bytes()
    assert json.loads((path.parent / "manifest.json").read_text())["models"][3]["name"] == "law"
    shutil.rmtree(alone.parent)
    assert len(UltraFuserForCausalLM.from_fusion(materialized(path)).specialists) == 4


def materialized(path: Path) -> Any:
    return materialize(load_fusion(path), path.parent / "merged", on_progress=lambda step, share: None)


@pytest.mark.parametrize("kind", ["paper", "smoothed", "joint+probabilities+scaled+smoothed"])
def test_a_newcomer_is_first_held_untrained_against_the_fusion_as_it_was(
    tiny_copy: Path,
    law: Path,
    add: Run,
    settings_of: Callable[..., TrainSettings],
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    with_gate(tiny_copy, GateKind.parse(kind))
    path = add(law, fusion=str(tiny_copy), steps=2, cache_states=kind == "smoothed")
    untrained = path.parent / "untrained.yaml"
    shutil.copy(path, untrained)
    untrained.write_text(untrained.read_text().replace("gate.safetensors", "untrained.safetensors"))
    before = load_gate(tiny_copy.parent / "gate.safetensors", NAMES, SIZES)
    save_gate(widened(before, 64), path.parent / "untrained.safetensors", (*NAMES, "law"))
    manifest = json.loads((path.parent / "manifest.json").read_text())
    first = next(entry for entry in manifest["history"] if "eval_loss" in entry)
    said = capsys.readouterr().err
    for domain in NAMES:
        old, is_token = read_domain(tiny_copy, settings_of(stage=1), domain)
        for fusion, metrics in ((untrained, first), (path, manifest["metrics"])):
            now, _ = read_domain(fusion, settings_of(stage=1, fusion=str(fusion)), domain)
            assert metrics[f"eval_loss_{domain}"] == pytest.approx(float(now.loss), rel=1e-4)
            assert metrics[f"eval_before_loss_{domain}"] == pytest.approx(float(old.loss), rel=1e-4)
            logs = [output.logits[is_token].log_softmax(dim=-1) for output in (now, old)]
            distance = float((logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1).mean())
            assert distance > 1e-4
            assert metrics[f"eval_distance_{domain}"] == pytest.approx(distance, rel=1e-3)
            for output, key, names in ((now, "gate", (*NAMES, "law")), (old, "before_gate", NAMES)):
                means = [float(weights[is_token].mean()) for weights in output.gate_weights]
                found = [metrics[f"eval_{key}_{domain}_{name}"] for name in names]
                assert found == pytest.approx(means, abs=1e-4)
            line = f"  {domain}: loss {metrics[f'eval_loss_{domain}']:.4f}, was {float(old.loss):.4f}; distance"
            assert line in said
    assert said.index("law, before training, on the rows") < said.index("law, trained, on the rows")
    is_shared = kind != "joint+probabilities+scaled+smoothed"
    assert f"gate ({kind}): " in said
    assert ("all learn, as none is law's alone" in said) == is_shared
    assert bool(changed_gate(path, widened(before, 64)))


def test_of_a_joint_gate_the_newcomers_columns_and_row_learn_and_nothing_else(
    tiny_copy: Path, law: Path, add: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with_gate(tiny_copy, GateKind(joint=True))
    path = add(law, fusion=str(tiny_copy), steps=6, learning_rate=1e-2)
    wider = widened(load_gate(tiny_copy.parent / "gate.safetensors", NAMES, SIZES), 64)
    changed, own = changed_gate(path, wider), own_parts(wider, 3)
    assert changed.keys() == own.keys() == {"hidden.weight", "score.weight", "score.bias"}
    for name, is_changed in changed.items():
        inside = int(is_changed.narrow(*own[name]).sum())
        assert inside == int(is_changed.sum()), "what is the others' is theirs bit for bit"
        assert inside > 0.9 * is_changed.narrow(*own[name]).numel()
    assert load_gate(path.parent / "gate.safetensors", (*NAMES, "law"), (*SIZES, 64)).kind == GateKind(joint=True)
    assert f"gate (joint): {4 * 64 * 32 + 32 + 4 * 33:,} parameters, {64 * 32 + 33:,} learn, those of law alone" in (
        capsys.readouterr().err
    )
    trained = load_file(path.parent / RUN_FOLDER / "checkpoint-6" / "trained.safetensors")
    assert trained.keys() == {f"fusion_gate.{name}" for name in own}


def test_a_newcomer_of_another_size_learns_a_projection_of_its_own(
    tiny_path: Path, add: Run, run: Run, tmp_path: Path
) -> None:
    path = add(write_law(tmp_path / "law", hidden_size=96), steps=6, cache_states=True, learning_rate=1e-2)
    wider = widened(load_gate(str(load_fusion(tiny_path).gate), NAMES, SIZES), 96)
    assert changed_gate(path, wider).keys() == {"projections.3.weight"}
    assert load_gate(path.parent / "gate.safetensors", (*NAMES, "law"), (*SIZES, 96)).projected_size == 64
    metrics = json.loads((path.parent / "manifest.json").read_text())
    first = next(entry for entry in metrics["history"] if "eval_loss" in entry)
    assert metrics["metrics"]["eval_loss"] < first["eval_loss"] - 0.05
    on = run(fusion=str(path), stage=1, output=str(tmp_path / "on"), learning_rate=1e-2)
    after = load_file(on.parent / "gate.safetensors")
    assert all(not torch.equal(after[f"projections.{place}.weight"], torch.eye(64)) for place in range(3)), "all learn"
    assert weights_of(on).keys() == weights_of(path).keys()


def test_a_resumed_run_ends_bit_for_bit_and_only_with_the_newcomer_that_it_began_with(
    tiny_copy: Path, law: Path, add: Run, tmp_path: Path
) -> None:
    with_gate(tiny_copy, GateKind(joint=True))
    moved = tmp_path / "moved"
    shutil.copytree(law.parent, moved)
    options: dict[str, Any] = {"fusion": str(tiny_copy), "save_every": 2, "cache_states": True}
    whole = add(law, **options, output=str(tmp_path / "whole"))
    stopped = add(law, **options, output=str(tmp_path / "stopped"))
    shutil.rmtree(stopped.parent / RUN_FOLDER / "checkpoint-4")
    wanted = load_file(whole.parent / "gate.safetensors")
    again = load_file(add(moved, **options, output=str(stopped.parent), resume=True).parent / "gate.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in wanted.items())
    state = load_file(moved / "law" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, moved / "law" / "model.safetensors")
    with pytest.raises(ValueError, match=r"the model of 'law' .* is not what the run to resume began with"):
        add(moved, **options, output=str(stopped.parent), resume=True)
    with_gate(tiny_copy, GateKind())
    with pytest.raises(ValueError, match="its gate is not what the run to resume began with"):
        add(law, **options, output=str(stopped.parent), resume=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, law: Path) -> dict[str, str]:
    """Fusions and newcomers that cannot come together, by name."""
    folder = tmp_path_factory.mktemp("sources")
    fresh = yaml_with(tiny_path, folder / "fresh.yaml", "package:fresh")
    lost = yaml_with(tiny_path, folder / "lost.yaml", "lost.safetensors")
    other = shutil.copytree(tiny_path.parent, folder / "other") / "fusion.yaml"
    save_gate(Gate((64, 64)), other.parent / "gate.safetensors", NAMES[:2])
    words = write_law(folder / "words", markers=[f"<{number}>" for number in range(8)]).parent
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    return {
        "tiny": str(tiny_path),
        "law": str(law),
        "fresh": fresh,
        "lost": lost,
        "other": str(other),
        "words": str(words),
        "adapter": str(adapter),
        "bare": str(law.parent / "law"),
    }


def yaml_with(fusion: Path, path: Path, gate: str) -> str:
    """A fusion of the same models with another gate."""
    content = yaml.safe_load(fusion.read_text())
    for item in content["specialists"]:
        item["model"] = str(fusion.parent / item["model"])
    path.write_text(yaml.safe_dump({**content, "gate": gate}))
    return str(path)


EVALUATED = ["--eval-data", str(CONVERSATIONS)]


@pytest.mark.parametrize(
    ("fusion", "added", "options", "complaint"),
    [
        ("tiny", "law", EVALUATED, "--add: 'law' is not NAME=SOURCE"),
        ("tiny", "a b={law}", EVALUATED, "--add: 'a b=.*' is not NAME=SOURCE"),
        ("tiny", "code={law}", EVALUATED, "--add: the name 'code' is taken, tiny has text, code, math; give the"),
        ("tiny", "law=/none", EVALUATED, "--add: '/none' is neither a folder nor a Hugging Face id"),
        ("tiny", "law=package:none", EVALUATED, "--add: law: model: package 'none' carries no known model"),
        ("tiny", "law={tiny}", EVALUATED, "--add: tiny has no specialist 'law'; take one of text, code, math under"),
        ("tiny", "law={adapter}", EVALUATED, "--add: .*adapter is an adapter; name a fusion file that has it"),
        ("tiny", "law={bare}", EVALUATED, "--add: law: chat_template: missing, and the tokenizer of .* has none"),
        ("tiny", "law={words}", EVALUATED, "--add: law: model: its tokenizer has .* where that of 'text' has"),
        ("fresh", "law={law}", EVALUATED, r"--add: tiny has no trained gate \(gate: package:fresh\); put law into"),
        ("lost", "law={law}", EVALUATED, r"--add: tiny has no trained gate \(gate: .*lost.safetensors\)"),
        ("law", "more={law}", EVALUATED, r"--add: tiny has no trained gate \(gate: None\)"),
        ("other", "law={law}", EVALUATED, r"specialists: the gate was made for \['text', 'code'\], the fusion has"),
        ("tiny", "law={law}", [], "--eval-data: --add holds the newcomer against the fusion as it was; name"),
        ("tiny", "law={law}", [*EVALUATED, "--fresh-gate"], "--fresh-gate: beside --add the trained gate is what"),
        ("tiny", "law={law}", [*EVALUATED, "--gate-kind", "paper"], "--gate-kind: beside --add the trained gate is"),
        ("tiny", "law={law}", [*EVALUATED, "--weight-decay", "0.1"], "--weight-decay: beside --add it would change"),
        ("tiny", "law={law}", [*EVALUATED, "--stage", "2"], "--add: the gate alone learns to weigh a newcomer"),
        ("tiny", "law={law}", [*EVALUATED, "--drafter"], "--stage: name either a stage"),
    ],
)
def test_who_cannot_join_is_told_in_one_line_before_any_work(
    sources: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fusion: str,
    added: str,
    options: list[str],
    complaint: str,
) -> None:
    argv = ["train", sources[fusion], "--add", added.format(**sources), "--data", str(CONVERSATIONS), *options]
    places = ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--steps", "1"]
    assert main([*argv, *places]) == EXIT_WRONG_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(f"ultrafuser: .*{complaint}", line), line
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_a_plan_counts_what_learns_of_the_gate(
    law: Path, settings_of: Callable[..., TrainSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings_of(add=f"law={law}", eval_data=[str(CONVERSATIONS)], plan=True))
    assert "gate (paper): 33,793 parameters, all learn, as none is law's alone" in capsys.readouterr().err
