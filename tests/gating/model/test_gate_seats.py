"""Gates with a seat more or less: what the others had stays, of every kind and for every set of sizes."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ultrafuser.gating.model.gate import Gate, fresh_gate
from ultrafuser.gating.model.gate_file import check_gate, load_gate, read_gate, save_gate
from ultrafuser.gating.model.gate_kind import CHANGES, GateKind
from ultrafuser.gating.model.gate_seats import num_own, own_parts, widened, without

KINDS = [GateKind(*changes) for changes in product([False, True], repeat=len(CHANGES))]
SIZES = [(8, 8, 8), (8, 12, 8)]
RESPONSES = torch.tensor([0, 0, 0, 1, 1])
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
each_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)


def trained_gate(sizes: Sequence[int], kind: GateKind, projected_size: int | None = None) -> Gate:
    """A gate without a number that is zero or one."""
    gate = Gate(sizes, width=16, kind=kind, projected_size=projected_size)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return gate


def states_of(sizes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(len(RESPONSES), size, generator=generator) for size in sizes]


def scores_of(gate: Gate, sizes: Sequence[int]) -> Tensor:
    """[S, N], up to a number that all of a column share."""
    return gate(states_of(sizes), RESPONSES).log()


@each_kind
@each_sizes
@pytest.mark.parametrize("newcomer", [8, 12, 20])
def test_the_others_stay_in_proportion_when_one_joins(kind: GateKind, sizes: tuple[int, ...], newcomer: int) -> None:
    gate = trained_gate(sizes, kind)
    wider = widened(gate, newcomer)
    assert (wider.hidden_sizes, wider.width, wider.kind) == ((*sizes, newcomer), 16, kind)
    before, now = scores_of(gate, sizes), scores_of(wider, (*sizes, newcomer))
    torch.testing.assert_close(now[:3] - now[0], before - before[0])
    if kind.scaled:
        assert torch.equal(wider.log_temperatures[:3], gate.log_temperatures)
        torch.testing.assert_close(wider.log_temperatures[3], gate.log_temperatures.mean())


@each_kind
@each_sizes
def test_one_that_leaves_again_leaves_the_gate_as_it_was(kind: GateKind, sizes: tuple[int, ...]) -> None:
    gate = trained_gate(sizes, kind)
    again = without(widened(gate, sizes[0]), 3)
    assert (again.hidden_sizes, again.projected_size) == (gate.hidden_sizes, gate.projected_size)
    state = again.state_dict()
    assert state.keys() == gate.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in gate.state_dict().items())


@each_kind
@each_sizes
@pytest.mark.parametrize("index", [0, 1, 2])
def test_weights_of_those_who_stay_are_shared_out_anew_in_proportion(
    kind: GateKind, sizes: tuple[int, ...], index: int
) -> None:
    gate = trained_gate(sizes, kind)
    rest = [place for place in range(3) if place != index]
    smaller = without(gate, index)
    states = states_of(sizes)
    now = smaller([states[place] for place in rest], RESPONSES)
    if kind.joint:  # what it added to everybody's scores is gone: as if its state were zero
        states[index] = torch.zeros_like(states[index])
    before = gate(states, RESPONSES)[rest]
    torch.testing.assert_close(now, before / before.sum(dim=0))
    if kind.scaled:
        assert torch.equal(smaller.log_temperatures, gate.log_temperatures[rest])


@each_kind
@each_sizes
def test_a_specialists_own_parts_are_all_that_only_its_place_reads(kind: GateKind, sizes: tuple[int, ...]) -> None:
    gate = trained_gate(sizes, kind)
    own = [own_parts(gate, index) for index in range(3)]
    parameters = dict(gate.named_parameters())
    for index in range(3):
        states = states_of(sizes)
        before = scores_of(gate, sizes)
        changed = trained_gate(sizes, kind)
        changed.load_state_dict(gate.state_dict())
        with torch.no_grad():
            for name, part in own[index].items():
                dict(changed.named_parameters())[name].narrow(*part).add_(1)
        now = changed(states, RESPONSES).log()
        others = [place for place in range(3) if place != index]
        if not kind.joint:  # a joint gate's columns move everybody's scores
            torch.testing.assert_close((now - now[others[0]])[others], (before - before[others[0]])[others])
        assert num_own(gate, index) == sum(parameters[name].narrow(*part).numel() for name, part in own[index].items())
    is_shared = not (kind.joint or kind.scaled or len(set(sizes)) > 1)
    assert (not own[0]) == is_shared


def test_a_newcomer_is_scored_by_the_network_that_all_share() -> None:
    gate = trained_gate((8, 8, 8), GateKind())
    wider, states = widened(gate, 8), states_of((8, 8, 8, 8))
    assert own_parts(wider, 3) == {}
    assert all(torch.equal(tensor, wider.state_dict()[name]) for name, tensor in gate.state_dict().items())
    alone = torch.cat([gate.part_of(0, state) for state in states], dim=-1)
    torch.testing.assert_close(wider(states), alone.T.softmax(dim=0))


def test_a_newcomer_of_another_size_has_all_projected_the_others_by_the_identity() -> None:
    wider = widened(trained_gate((8, 8), GateKind()), 12)
    assert wider.projected_size == 8
    first, second, own = (wider.state_dict()[f"projections.{place}.weight"] for place in range(3))
    assert torch.equal(first, torch.eye(8))
    assert torch.equal(second, torch.eye(8))
    assert own.shape == (8, 12)
    assert not own.any()
    assert own_parts(wider, 2).keys() == {"projections.2.weight"}
    assert num_own(wider, 2) == 96


def test_a_newcomers_own_numbers_can_learn_all_that_they_are_there_for() -> None:
    """Zeros are a good start only if a gradient leads away from each of them."""
    for kind, newcomer in ((GateKind(), 12), (GateKind(joint=True, smoothed=True, scaled=True), 8)):
        gate = widened(trained_gate((8, 8), kind), newcomer)
        gate(states_of((8, 8, newcomer)), RESPONSES)[0].log().sum().backward()
        for name, part in own_parts(gate, 2).items():
            gradient = dict(gate.named_parameters())[name].grad
            if name != "log_temperatures":  # of the mixture
                assert gradient is not None
                assert bool(gradient.narrow(*part).any()), name


def test_states_stay_projected_where_all_sizes_have_become_equal(tmp_path: Path) -> None:
    gate = without(trained_gate((8, 12, 8), GateKind()), 1)
    assert (gate.hidden_sizes, gate.projected_size) == ((8, 8), 12)
    path = tmp_path / "gate.safetensors"
    save_gate(gate, path, ("a", "b"))
    loaded = load_gate(path, ("a", "b"), (8, 8))
    assert torch.equal(loaded(states_of((8, 8))), gate(states_of((8, 8))))
    assert check_gate(path, ("a", "b"), (8, 8)).projected_size == 12
    assert read_gate(path, ("a", "b")).projected_size == 12


def test_a_file_says_a_projections_size_only_where_it_is_not_the_usual_one(tmp_path: Path) -> None:
    for sizes in SIZES:
        save_gate(fresh_gate(sizes, width=16), tmp_path / "gate.safetensors", ("a", "b", "c"))
        assert check_gate(tmp_path / "gate.safetensors", ("a", "b", "c"), sizes).projected_size is None
