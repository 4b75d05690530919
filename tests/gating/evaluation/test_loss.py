"""Held-out losses: those of the reference, for every row of the table, from one pass over hidden states."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.fakes import write_tiny_fusion
from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.data.batches import collate_rows
from ultrafuser.gating.data.conversations import DataFile
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.evaluation import loss
from ultrafuser.gating.evaluation.held_out import ReadingOptions, ReadingTask, prepare_task
from ultrafuser.gating.evaluation.loss import LossTable, describe
from ultrafuser.gating.model.cache import Report
from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.gate_file import save_gate
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.model.schema import FusionConfig

NAMES = ("text", "code", "math")
# Both sides compute in float32; the sums of a few hundred tokens differ in their order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ReadingOptions:
    return ReadingOptions(cache_dir=tmp_path_factory.mktemp("cache"), precision="float32")


@pytest.fixture
def task_of(options: ReadingOptions) -> Callable[..., ReadingTask]:
    quiet: Report = lambda label, share: None  # noqa: E731

    def make(path: Path, **changes: Any) -> ReadingTask:
        own = ReadingOptions(**(vars(options) | changes))
        return prepare_task(str(path), [DataFile.parse(str(CONVERSATIONS))], own, quiet)

    return make


def reference_loss(fusion: FusionConfig, task: ReadingTask, domain: str) -> float:
    """The reference's own loss on one domain, whatever the number of its specialists."""
    model = UltraFuserForCausalLM.from_fusion(fusion)
    batch = collate_rows([task.rows.dataset[row] for row in task.places[domain]])
    batch.pop("labels")
    count = len(fusion.specialists)
    with torch.no_grad():
        loss = model(**{name: tensors[:count] for name, tensors in batch.items()}).loss
    assert loss is not None
    return float(loss)


def measure(task: ReadingTask, base: str | None = None, scale: float = 0.4) -> LossTable:
    return loss.measure(task, base=base, scale=scale)


def single(fusion: FusionConfig, index: int) -> FusionConfig:
    return fusion.model_copy(update={"specialists": (fusion.specialists[index],), "gate": None})


def test_the_fused_rows_loss_and_weights_are_the_references(tiny_path, task_of):
    task = task_of(tiny_path)
    table = measure(task)
    assert list(table.tokens) == list(NAMES), "domains in the order of the specialists"
    for domain in NAMES:
        assert table.loss("fused", domain) == pytest.approx(reference_loss(task.loaded, task, domain), abs=TOLERANCE)
        batch = collate_rows([task.rows.dataset[row] for row in task.places[domain]])
        batch.pop("labels")
        with torch.no_grad():
            output = UltraFuserForCausalLM.from_fusion(task.loaded)(**batch)
        mask = output.labels >= 0
        means = output.gate_weights[:, mask].mean(dim=1).tolist()
        assert list(table.gate[domain].values()) == pytest.approx(means, abs=TOLERANCE)


def test_a_specialists_row_is_that_of_a_gate_which_always_takes_it(tiny_path, task_of, tmp_path):
    table = measure(task_of(tiny_path))
    for name in NAMES:
        closed = write_tiny_fusion(tmp_path / name, gate=f"closed:{name}")
        own = measure(task_of(closed))
        assert own.loss("fused", "math") == pytest.approx(table.loss(name, "math"), abs=TOLERANCE)
        assert own.loss("fused", "math") == own.loss(name, "math")


def test_the_uniform_row_is_a_gate_that_scores_all_alike(tiny_path, task_of, tmp_path):
    gate = Gate((64, 64, 64))
    for parameter in gate.parameters():
        torch.nn.init.zeros_(parameter)
    save_gate(gate, tmp_path / "gate.safetensors", NAMES)
    task = task_of(tiny_path)
    equal = task.loaded.model_copy(update={"gate": str(tmp_path / "gate.safetensors")})
    assert measure(task).loss("uniform", "code") == pytest.approx(reference_loss(equal, task, "code"), abs=TOLERANCE)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three specialists of one shape, but for the number of ids of their own."""
    return write_tiny_fusion(tmp_path_factory.mktemp("alike"), num_layers=(1, 1, 1))


def combined(task: ReadingTask, factors: tuple[float, ...]) -> float:
    """Loss on code of weights added by hand, in the leader's template."""
    models = [UltraFuserForCausalLM.from_fusion(single(task.loaded, index)) for index in range(3)]
    states = [model.state_dict() for model in models]
    for name, tensor in states[0].items():
        others = [state[name][: len(tensor)] for state in states]
        # The first vocabulary is the smallest: rows beyond it have no counterpart in the others.
        tensor.copy_(sum(factor * own for factor, own in zip(factors, others, strict=True)))
    batch = collate_rows([task.rows.dataset[row] for row in task.places["code"]])
    batch.pop("labels")
    with torch.no_grad():
        loss = models[0](**{name: tensors[:1] for name, tensors in batch.items()}).loss
    return float(loss)


def test_the_average_row_is_the_mean_of_the_weights_on_the_shared_ids(alike, task_of):
    task = task_of(alike)
    table = measure(task)
    assert table.loss("average", "code") == pytest.approx(combined(task, (1 / 3, 1 / 3, 1 / 3)), abs=1e-4)


def test_task_arithmetic_adds_the_differences_from_the_base(alike, task_of):
    task = task_of(alike)
    table = measure(task, base=task.loaded.specialists[0].model, scale=0.6)
    # base + 0.6 x (0 + (code - base) + (math - base))
    assert table.loss("task_arithmetic", "code") == pytest.approx(combined(task, (-0.2, 0.6, 0.6)), abs=1e-4)
    assert table.loss("base", "code") == pytest.approx(table.loss("text", "code"), abs=TOLERANCE)


def test_the_base_of_specialists_with_adapters_is_the_model_that_they_share(alike, run, task_of, tmp_path):
    content = yaml.safe_load(alike.read_text())
    for specialist in content["specialists"]:
        specialist["model"] = str(alike.parent / "text")
    path = tmp_path / "same.yaml"
    path.write_text(yaml.safe_dump(content | {"gate": "package:fresh"}))
    table = measure(task_of(path))
    assert table.sums.keys() == {*NAMES, "base", "average", "task_arithmetic", "uniform", "fused"}
    assert table.mean("average") == pytest.approx(table.mean("base"), abs=TOLERANCE)
    trained = measure(task_of(run(fusion=str(path), stage=2, steps=3, learning_rate=3e-2)))
    assert trained.mean("base") == pytest.approx(table.mean("base"), abs=TOLERANCE), "adapters must be off"
    assert trained.mean("text") < table.mean("text") - 0.1, "and on"


def test_rows_that_cannot_be_had_are_named_with_the_reason(tiny_path, task_of):
    table = measure(task_of(tiny_path))
    assert not {"base", "average", "task_arithmetic"} & set(table.sums)
    assert "name different models" in table.notes[0]
    assert "different shapes" in table.notes[1]
    assert describe(table)[-2:] == list(table.notes)


def test_a_limit_draws_the_same_rows_for_every_fusion(tiny_path, alike, task_of):
    first, second = measure(task_of(tiny_path, limit=4)), measure(task_of(alike, limit=4))
    assert [len(tokens) for tokens in first.tokens.values()] == [4, 4, 4]
    both = first.with_baseline(second)
    assert both.loss("baseline:fused", "code") == second.loss("fused", "code")
    assert both.loss("fused", "code") == first.loss("fused", "code")
    with pytest.raises(CommandError, match="other response tokens"):
        first.with_baseline(measure(task_of(tiny_path, limit=3)))


def test_a_specialist_named_as_a_row_of_the_table_is_refused(tmp_path, task_of):
    path = write_tiny_fusion(tmp_path, names=("text", "average", "math"))
    with pytest.raises(CommandError, match="'average' is the name of a row"):
        measure(task_of(path))


def table_of(ours: list[float], theirs: list[float], tokens: list[float]) -> LossTable:
    sums = {"fused": {"code": np.array(ours)}, "code": {"code": np.array(theirs)}}
    return LossTable(sums, {"code": np.array(tokens)}, {})


def test_the_mean_over_tokens_weighs_conversations_by_their_length():
    table = table_of([1.0, 9.0], [2.0, 2.0], [1.0, 3.0])
    assert table.loss("fused", "code") == 2.5
    assert table.as_json() == {
        "loss": {"fused": {"code": 2.5, "mean": 2.5}, "code": {"code": 1.0, "mean": 1.0}},
        "gate": {},
    }


def test_differences_are_paired_so_that_what_conversations_share_does_not_widen_them():
    generator = np.random.default_rng(0)
    theirs = generator.uniform(1, 100, size=200)
    value, low, high = table_of(list(0.9 * theirs), list(theirs), [10.0] * 200).difference("fused", "code")["code"]
    assert (value, low, high) == pytest.approx((-0.1, -0.1, -0.1))
    noisy = list(theirs * generator.uniform(0.5, 1.3, size=200))
    value, low, high = table_of(noisy, list(theirs), [10.0] * 200).difference("fused", "code")["code"]
    assert low < value < high
    # The standard error by hand: of a ratio of sums over independent conversations.
    errors = (np.array(noisy) - (1 + value) * theirs) / theirs.sum()
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt((errors**2).sum()), rel=0.15)
