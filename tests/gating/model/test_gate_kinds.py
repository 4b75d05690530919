"""Kinds of gate: their names, their formulas written out in float64, their files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ultrafuser.gating.errors import GateError
from ultrafuser.gating.model.gate import Gate, fresh_gate, means_before
from ultrafuser.gating.model.gate_file import gate_kind, load_gate, read_gate, save_gate
from ultrafuser.gating.model.gate_kind import CHANGES, PAPER, GateKind

NAMES = ("text", "code", "math")
# Of responses of so many tokens, the first of which is longer than what one product of matrices computes.
LENGTHS = (300, 1, 7)
RESPONSES = torch.repeat_interleave(torch.tensor([4, 2, 9]), torch.tensor(LENGTHS))
KINDS = ["paper", *CHANGES, "joint+smoothed", "joint+probabilities+scaled+smoothed"]
TOLERANCE: Any = {"rtol": 1e-4, "atol": 1e-5}


def random_gate(kind: str, sizes: Sequence[int] = (8, 8, 8)) -> Gate:
    """Every parameter drawn, those that begin as zeros too."""
    gate = Gate(sizes, width=16, kind=GateKind.parse(kind))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        if gate.kind.smoothed:
            gate.decay_logit.fill_(1.0)
    return gate


def random_states(sizes: Sequence[int] = (8, 8, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(len(RESPONSES), size, generator=generator) for size in sizes]


def plain_means(states: Tensor, decay: float) -> Tensor:
    """m_1 = 0, m_t = decay m_(t-1) + (1 - decay) h_(t-1), anew in each response."""
    means, before = torch.zeros_like(states), -1
    for index, response in enumerate(RESPONSES.tolist()):
        if response == before:
            means[index] = decay * means[index - 1] + (1 - decay) * states[index - 1]
        before = response
    return means


def plain_weights(gate: Gate, states: Sequence[Tensor]) -> Tensor:
    """The formulas of docs/training.md, in float64."""
    own = {name: tensor.double() for name, tensor in gate.state_dict().items()}
    wide = [state.double() for state in states]
    if gate.projections:
        wide = [state @ own[f"projections.{index}.weight"].T for index, state in enumerate(wide)]
    if gate.kind.joint:
        wide = [torch.cat(wide, dim=1)]
    scores = []
    for state in wide:
        inner = state @ own["hidden.weight"].T + own["hidden.bias"]
        if gate.kind.smoothed:
            decay = float(torch.sigmoid(own["decay_logit"]))
            inner = inner + plain_means(state, decay) @ own["memory.weight"].T
        scores.append(inner.clamp(min=0) @ own["score.weight"].T + own["score.bias"])
    scores_NS = torch.cat(scores, dim=1)
    if gate.kind.scaled:
        scores_NS = scores_NS + own["biases"]
    exponentials = scores_NS.exp()
    return (exponentials / exponentials.sum(dim=1, keepdim=True)).T


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 12, 6)], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_follow_the_kinds_formula_token_by_token_and_anew_in_each_response(kind, sizes):
    gate, states = random_gate(kind, sizes), random_states(sizes)
    torch.testing.assert_close(gate(states, RESPONSES).double(), plain_weights(gate, states), **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_in_parts_token_by_token_is_the_gate_over_all_tokens(kind):
    gate, states = random_gate(kind), random_states()
    wanted = gate(states, RESPONSES)
    found, before = [], -1
    memories: list[Tensor | None] = []
    for index, response in enumerate(RESPONSES.tolist()):
        if response != before:
            memories = [torch.zeros(gate.width) if gate.kind.smoothed else None] * len(states)
        now = [state[index] for state in states]
        parts = [gate.part_of(own, now[own], memories[own]) for own in range(len(states))]
        assert parts[0].shape == (gate.part_size,)
        found.append(gate.weights_of(torch.stack(parts)))
        memories = [
            None if memory is None else gate.remember(own, now[own], memory) for own, memory in enumerate(memories)
        ]
        before = response
    torch.testing.assert_close(torch.stack(found, dim=1), wanted, **TOLERANCE)


def test_the_joint_gate_looks_at_the_others_states_and_the_papers_does_not():
    states = random_states()
    changed = [states[0], states[1] + 1, states[2]]
    ratios = []
    for kind in ("paper", "joint"):
        gate = random_gate(kind)
        # Of the two specialists whose own states are the same.
        ratios.append([gate(own, RESPONSES)[0] / gate(own, RESPONSES)[2] for own in (states, changed)])
    torch.testing.assert_close(*ratios[0])
    assert not torch.allclose(ratios[1][0], ratios[1][1], atol=0.1)


def test_without_responses_every_position_is_the_first_of_one():
    gate, states = random_gate("smoothed"), random_states()
    torch.testing.assert_close(gate(states), gate(states, torch.arange(len(RESPONSES))))
    starts = [0, 300, 301]
    torch.testing.assert_close(gate(states)[:, starts], gate(states, RESPONSES)[:, starts])
    assert not torch.allclose(gate(states)[:, 1:300], gate(states, RESPONSES)[:, 1:300], atol=0.01)


def test_means_are_those_of_a_plain_loop_also_over_several_blocks():
    states = random_states()[0].double()
    found = means_before(states, torch.tensor(0.97, dtype=torch.float64), RESPONSES)
    torch.testing.assert_close(found, plain_means(states, 0.97))


def test_means_have_the_gradients_of_a_plain_loop():
    generator = torch.Generator().manual_seed(7)
    states = torch.randn(len(RESPONSES), 3, dtype=torch.float64, generator=generator)
    factors = torch.randn(len(RESPONSES), 3, dtype=torch.float64, generator=generator)
    decay = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    states.requires_grad_()
    (means_before(states, decay, RESPONSES) * factors).sum().backward()
    step = 1e-6
    above, below = (
        (means_before(states.detach(), decay.detach() + sign * step, RESPONSES) * factors).sum() for sign in (1, -1)
    )
    assert decay.grad is not None
    assert float(decay.grad) == pytest.approx(float(above - below) / (2 * step), rel=1e-6)
    # Of a state: (1 - decay) decay^k of each factor k + 1 positions later in its response.
    wanted = torch.zeros_like(states)
    for index in range(len(RESPONSES)):
        for later in range(index + 1, len(RESPONSES)):
            if RESPONSES[later] == RESPONSES[index] and later - index < 250:
                wanted[index] += 0.1 * 0.9 ** (later - index - 1) * factors[later]
    torch.testing.assert_close(states.grad, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_a_gate_gets_the_gradient_of_finite_differences(kind):
    """Also the decay, the temperatures and the biases; the loss reaches temperatures through the mixture."""
    gate, states = random_gate(kind).double(), random_states()
    factors = torch.randn(3, len(RESPONSES), generator=torch.Generator().manual_seed(8))

    def value() -> Tensor:
        scales = gate.mixture.scales_S
        return (gate(states, RESPONSES) * factors).sum() + (0 if scales is None else (scales * factors[:, 0]).sum())

    value().backward()
    for name, parameter in gate.named_parameters():
        assert parameter.grad is not None, name
        flat, place = parameter.detach().view(-1), int(parameter.grad.abs().argmax())
        before = float(flat[place])
        found = []
        for sign in (1, -1):
            flat[place] = before + sign * 1e-3
            found.append(float(value().detach()))
        flat[place] = before
        # The gate computes in float32, whatever its parameters' type.
        assert float(parameter.grad.view(-1)[place]) == pytest.approx((found[0] - found[1]) / 2e-3, rel=0.05, abs=0.05)


def test_a_smoothed_gates_weights_are_float32_also_under_autocast():
    gate, states = random_gate("smoothed"), random_states()
    wanted = gate(states, RESPONSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(states, RESPONSES), wanted)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("paper", "paper"),
        ("smoothed", "smoothed"),
        ("scaled+joint", "joint+scaled"),
        ("smoothed+scaled+probabilities+joint", "joint+probabilities+scaled+smoothed"),
    ],
)
def test_a_kind_is_written_with_its_changes_in_one_order(text, written):
    assert str(GateKind.parse(text)) == written
    assert GateKind.parse(written) == GateKind.parse(text)


@pytest.mark.parametrize("text", ["", "fancy", "paper+joint", "joint+joint", "joint+", "Joint", "paper+paper"])
def test_another_kind_is_refused_with_those_that_there_are(text):
    with pytest.raises(GateError) as caught:
        GateKind.parse(text)
    assert str(caught.value) == (
        f"unknown gate kind {text!r}; use paper, or one or more of joint, probabilities, scaled, smoothed, as a+b"
    )


def test_a_fresh_gate_of_any_kind_begins_as_the_papers_would_on_what_they_share():
    """Neutral: temperatures of one, no biases. And the same seed is the same gate."""
    fresh = fresh_gate((8, 8, 8), width=16, seed=3, kind=GateKind.parse("scaled+smoothed"))
    paper = fresh_gate((8, 8, 8), width=16, seed=3)
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in paper.state_dict().items())
    assert fresh.mixture.scales_S is not None
    assert fresh.mixture.scales_S.tolist() == [1.0, 1.0, 1.0]
    assert fresh.biases.tolist() == [0.0, 0.0, 0.0]
    assert float(fresh.decay.detach()) == pytest.approx(0.9)
    again = fresh_gate((8, 8, 8), width=16, seed=3, kind=GateKind.parse("scaled+smoothed"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 12, 6)], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_gate_of_any_kind_loads_bit_identical(tmp_path: Path, kind, sizes):
    gate, path = random_gate(kind, sizes), tmp_path / "gate.safetensors"
    save_gate(gate, path, NAMES)
    loaded = load_gate(path, NAMES, sizes)
    assert str(gate_kind(path)) == str(loaded.kind) == kind
    assert gate.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in gate.state_dict().items())


FIRST_METADATA = {
    "format": "ultrafuser-gate-v1",
    "specialists": json.dumps(NAMES),
    "hidden_sizes": json.dumps([8, 8, 8]),
    "width": "16",
}


def test_a_file_from_before_there_were_kinds_is_a_gate_of_the_papers(tmp_path: Path):
    gate, path = random_gate("paper"), tmp_path / "gate.safetensors"
    save_file(gate.state_dict(), path, FIRST_METADATA)
    loaded = load_gate(path, NAMES, (8, 8, 8))
    assert str(loaded.kind) == PAPER
    assert torch.equal(loaded(random_states()), gate(random_states()))


def test_an_unknown_kind_in_a_file_is_one_line(tmp_path: Path):
    path = tmp_path / "gate.safetensors"
    save_file(random_gate("paper").state_dict(), path, {**FIRST_METADATA, "format": "ultrafuser-gate-v2", "kind": "x"})
    with pytest.raises(GateError, match=r"gate\.safetensors: kind: unknown gate kind 'x'; use paper, or") as caught:
        load_gate(path, NAMES, (8, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["paper", "joint", "scaled"])
def test_a_file_with_the_tensors_of_another_kind_is_refused(tmp_path: Path, kind):
    path = tmp_path / "gate.safetensors"
    save_gate(random_gate("smoothed"), path, NAMES)
    metadata = {**FIRST_METADATA, "format": "ultrafuser-gate-v2", "kind": kind}
    save_file(load_file(path), path, metadata)
    with pytest.raises(GateError, match=r"shape is .*, need .*; save the gate again") as caught:
        load_gate(path, NAMES, (8, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("width", "-5"),
        ("width", str(10**30)),
        ("hidden_sizes", "[8, -8, 8]"),
        ("hidden_sizes", "[8, 8]"),
        ("projected_size", "0"),
        ("projected_size", "-5"),
        ("projected_size", str(10**30)),
    ],
)
def test_a_file_whose_sizes_are_none_is_one_line_that_names_it(tmp_path: Path, key, value):
    """Torch's own errors came through, of pages; and of a width the file was not named."""
    path = tmp_path / "gate.safetensors"
    save_file(random_gate("paper").state_dict(), path, {**FIRST_METADATA, key: value})
    with pytest.raises(GateError, match=r"gate\.safetensors: metadata: cannot be read \(ValueError") as caught:
        read_gate(path, NAMES)
    assert "\n" not in str(caught.value)
