"""The gate: its arithmetic, its extremes, its file."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ultrafuser.gating.errors import GateError
from ultrafuser.gating.model.gate import Gate, fresh_gate
from ultrafuser.gating.model.gate_file import check_gate, load_gate, save_gate
from ultrafuser.gating.model.mixture import fuse

NAMES = ("text", "code", "math")


def random_states(sizes: Sequence[int], *shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, size, generator=generator) for size in sizes]


def test_weights_follow_the_papers_formula():
    gate = fresh_gate((8, 8, 8), width=16)
    states = random_states((8, 8, 8), 5)
    scores = []
    for state in states:
        inner = torch.clamp(state @ gate.hidden.weight.T + gate.hidden.bias, min=0)
        scores.append((inner @ gate.score.weight.T + gate.score.bias)[:, 0])
    exponentials = torch.stack(scores).exp()
    torch.testing.assert_close(gate(states), exponentials / exponentials.sum(dim=0))


def test_one_gate_serves_all_specialists_of_equal_size():
    gate = Gate((8, 8, 8))
    assert {name: tuple(tensor.shape) for name, tensor in gate.state_dict().items()} == {
        "hidden.weight": (512, 8),
        "hidden.bias": (512,),
        "score.weight": (1, 512),
        "score.bias": (1,),
    }
    states = random_states((8, 8, 8), 4)
    swapped = gate([states[1], states[0], states[2]])
    torch.testing.assert_close(swapped, gate(states)[[1, 0, 2]])


def test_unequal_sizes_get_one_projection_each_without_a_bias():
    gate = Gate((8, 12, 8), width=16)
    shapes = {name: tuple(tensor.shape) for name, tensor in gate.projections.state_dict().items()}
    assert shapes == {"0.weight": (12, 8), "1.weight": (12, 12), "2.weight": (12, 8)}
    weights = gate(random_states((8, 12, 8), 2, 3))
    assert weights.shape == (3, 2, 3)
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, 3))


def test_a_single_specialist_has_weight_one():
    assert torch.equal(fresh_gate((8,))(random_states((8,), 4)), torch.ones(1, 4))


def test_weights_are_float32_for_bfloat16_states_also_under_autocast():
    gate = fresh_gate((8, 8), width=16)
    states = [state.bfloat16() for state in random_states((8, 8), 4)]
    wanted = gate([state.float() for state in states])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = gate(states)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, wanted)
    assert torch.equal(gate.bfloat16()(states).sum(dim=0), gate(states).sum(dim=0))
    assert gate(states).dtype == torch.float32


def test_a_gate_of_extreme_scores_is_closed_or_open_exactly():
    gate = Gate((2, 2), width=1)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        gate.hidden.weight[0, 0] = 1000
        gate.score.weight[0, 0] = 1
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert gate([first, second]).tolist() == [[1.0], [0.0]]
    assert gate([second, first]).tolist() == [[0.0], [1.0]]
    assert gate([first, first]).tolist() == [[0.5], [0.5]]


def test_fuse_mixes_logits_by_hand_written_numbers():
    weights = torch.tensor([[0.25, 1.0], [0.75, 0.0]])
    first = torch.tensor([[4.0, 0.0, -8.0, 99.0], [1.0, 2.0, 3.0, 99.0]])
    second = torch.tensor([[0.0, 4.0, 8.0], [7.0, 8.0, 9.0]])
    fused = fuse(weights, [first, second], num_shared_ids=3)
    assert fused.tolist() == [[1.0, 3.0, 4.0], [1.0, 2.0, 3.0]]


def test_fuse_leaves_its_inputs_alone_and_returns_float32():
    logits = [torch.ones(1, 3, dtype=torch.bfloat16), torch.full((1, 4), 2.0)]
    fused = fuse(torch.tensor([[1.0], [0.0]]), logits, num_shared_ids=3)
    assert fused.dtype == torch.float32
    assert fused.tolist() == [[1.0, 1.0, 1.0]]
    fused.fill_(5)
    assert logits[0].tolist() == [[1.0, 1.0, 1.0]]
    assert logits[1].tolist() == [[2.0, 2.0, 2.0, 2.0]]


def test_a_fresh_gate_is_the_same_every_time_and_spends_no_global_randomness():
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    first = fresh_gate((8, 12))
    assert torch.equal(torch.rand(1), wanted)
    torch.manual_seed(2)
    second = fresh_gate((8, 12))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    other = fresh_gate((8, 12), seed=1)
    assert not torch.equal(first.hidden.weight, other.hidden.weight)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 12, 8)])
def test_a_saved_gate_loads_bit_identical(tmp_path: Path, sizes: tuple[int, ...]):
    gate = fresh_gate(sizes, width=16, seed=3)
    save_gate(gate, tmp_path / "gate.safetensors", NAMES)
    loaded = load_gate(tmp_path / "gate.safetensors", NAMES, sizes)
    assert loaded.width == 16
    assert gate.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in gate.state_dict().items())


def test_the_header_names_format_kind_specialists_sizes_and_width(tmp_path: Path):
    path = tmp_path / "gate.safetensors"
    save_gate(fresh_gate((8, 12), width=16), path, ("a", "b"))
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {
            "format": "ultrafuser-gate-v2",
            "kind": "paper",
            "specialists": json.dumps(["a", "b"]),
            "hidden_sizes": json.dumps([8, 12]),
            "width": "16",
        }
    header = check_gate(path, ("a", "b"), (8, 12))
    assert (header.specialists, header.hidden_sizes, header.width) == (("a", "b"), (8, 12), 16)


def test_package_fresh_needs_no_file():
    gate = load_gate("package:fresh", NAMES, (8, 8, 8))
    assert torch.equal(gate.hidden.weight, fresh_gate((8, 8, 8)).hidden.weight)


@pytest.mark.parametrize(
    ("names", "sizes", "complaint"),
    [
        (("text", "math", "code"), (8, 8, 8), "specialists"),
        (NAMES, (8, 8, 12), "hidden_sizes"),
        (("text", "code"), (8, 8), "specialists"),
    ],
)
def test_a_gate_of_other_specialists_is_refused_by_key(tmp_path, names, sizes, complaint):
    path = tmp_path / "gate.safetensors"
    save_gate(fresh_gate((8, 8, 8), width=16), path, NAMES)
    with pytest.raises(GateError, match=f": {complaint}: the gate was made for") as caught:
        load_gate(path, names, sizes)
    assert "\n" not in str(caught.value)


GOOD_METADATA = {"format": "ultrafuser-gate-v1", "specialists": '["a"]', "hidden_sizes": "[8]", "width": "16"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": "ultrafuser-gate-v0"}, "format: is 'ultrafuser-gate-v0'"),
        ({"specialists": "a"}, "metadata: cannot be read"),
        ({"width": None}, "metadata: cannot be read"),
        ({"width": "17"}, r"hidden.bias: shape is \(16,\), need \(17,\)"),
    ],
)
def test_a_gate_with_wrong_metadata_is_refused_in_one_line(tmp_path, changes, complaint):
    path = tmp_path / "gate.safetensors"
    metadata = {key: value for key, value in {**GOOD_METADATA, **changes}.items() if value is not None}
    save_file(fresh_gate((8,), width=16).state_dict(), str(path), metadata=metadata)
    with pytest.raises(GateError, match=complaint) as caught:
        load_gate(path, ("a",), (8,))
    assert "\n" not in str(caught.value)


def test_a_missing_or_additional_tensor_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "gate.safetensors"
    tensors = fresh_gate((8,), width=16).state_dict()
    save_file({name: tensor for name, tensor in tensors.items() if name != "score.bias"}, str(path), GOOD_METADATA)
    with pytest.raises(GateError, match=r"score\.bias: shape is None, need"):
        load_gate(path, ("a",), (8,))
    save_file({**tensors, "extra": torch.ones(1)}, str(path), GOOD_METADATA)
    with pytest.raises(GateError, match=r"extra: shape is"):
        load_gate(path, ("a",), (8,))


def test_a_missing_file_and_a_file_of_another_kind_are_refused(tmp_path: Path):
    with pytest.raises(GateError, match=r"no such gate file; train a gate, or use `gate: package:fresh`"):
        load_gate(tmp_path / "gate.safetensors", ("a",), (8,))
    (tmp_path / "gate.safetensors").write_text("not tensors")
    with pytest.raises(GateError, match="not a safetensors file"):
        load_gate(tmp_path / "gate.safetensors", ("a",), (8,))


def test_names_that_do_not_fit_the_gate_are_refused_at_saving(tmp_path: Path):
    with pytest.raises(GateError, match="specialists: 2 names for a gate of 3"):
        save_gate(fresh_gate((8, 8, 8)), tmp_path / "gate.safetensors", ("a", "b"))
