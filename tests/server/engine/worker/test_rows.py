"""Two positions of one request in one step, as drafts will bring them, beside a request with one: each on every way."""

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.outputs import CompletionOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from ultrafuser.gating.model.gate import fresh_gate
from ultrafuser.gating.model.gate_kind import CHANGES, PAPER, GateKind
from ultrafuser.gating.model.mixture import fuse
from ultrafuser.server.engine.client.mark_stream import History, Takeover
from ultrafuser.server.engine.client.step_feed import StepFeed
from ultrafuser.server.engine.core.outputs import add_marks, add_report
from ultrafuser.server.engine.shared.extra_args import FORCED_TOKEN_IDS
from ultrafuser.server.engine.shared.report import StepReport
from ultrafuser.server.engine.shared.round import Decision, Round, Undrafted
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.shared.step import Span, StepRecord
from ultrafuser.server.engine.worker.forcing import Forcing, given_tokens
from ultrafuser.server.engine.worker.gate_parts import GateParts
from ultrafuser.server.engine.worker.mixing import Mixer, Rows
from ultrafuser.server.engine.worker.output import StepOnTheWay
from ultrafuser.server.engine.worker.sampling import in_order_of
from ultrafuser.server.engine.worker.split_mixing import _as_numbers, _spans
from ultrafuser.server.engine.worker.timing import StepClock

NUM_SHARED, WIDTHS = 10, (12, 10, 11)
LEADER = [
    Row("one", 7, is_draft=False, slot=0),
    Row("two", 3, is_draft=False, slot=1),
    Row("two", 4, is_draft=True, slot=1),
]
"""The response of "two" has 3 tokens; one draft follows."""
FOLLOWER = [Row("two", 3, False, 0), Row("two", 4, True, 0), Row("one", 7, False, 1)]
"""The same, in another batch order."""
UNFINISHED = Row("three", 0, is_draft=False, slot=2)
"""Whose prefill goes on: its row is garbage."""
NAMES = ["a", "b", "c"]
MARKS_BX = np.arange(21, dtype=np.float32).reshape(3, 7)
MARKS_BX[:, -1] = 0


GATE = fresh_gate((4, 4, 4), width=8).requires_grad_(False)


def forward_passes(orders: list[list[Row]]) -> tuple[list[Rows], dict[tuple[str, int], list[tuple[Tensor, Tensor]]]]:
    """Random results of three specialists, and the same by request and position."""
    generator = torch.Generator().manual_seed(0)
    passes: list[Rows] = []
    found: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for rows, width in zip(orders, WIDTHS, strict=True):
        hidden_RD = torch.randn(len(rows), 4, generator=generator)
        logits_RV = torch.randn(len(rows), width, generator=generator)
        passes.append(Rows(rows, hidden_RD, logits_RV))
        for row, hidden_D, logits_V in zip(rows, hidden_RD, logits_RV, strict=True):
            found.setdefault((row.request, row.position), []).append((hidden_D, logits_V))
    return passes, found


@pytest.mark.parametrize("others", [[], [UNFINISHED]], ids=["all rows end", "one goes on"])
def test_rows_are_mixed_with_the_same_position_of_the_other_specialists(
    monkeypatch: pytest.MonkeyPatch, others: list[Row]
) -> None:
    monkeypatch.setattr("ultrafuser.server.engine.worker.mixing.get_tp_group", lambda: SimpleNamespace(world_size=1))
    passes, found = forward_passes([[*LEADER, *others], [*others, *FOLLOWER], [*LEADER, *others]])
    mixer = Mixer(GateParts(GATE, range(3), 2, 2), NUM_SHARED)
    fused_RV, marks_XB, hidden_SBD = mixer.fuse_into_leader(passes, LEADER, StepClock(torch.device("cpu")))
    assert fused_RV.shape == passes[0].logits_RV.shape
    for index, row in enumerate(LEADER):
        hidden_SD, logits_SV = zip(*found[row.request, row.position], strict=True)
        assert all(torch.equal(own_BD[index], own_D) for own_BD, own_D in zip(hidden_SBD, hidden_SD, strict=True))
        weights_SB = GATE([hidden_D[None] for hidden_D in hidden_SD])
        wanted_BV = fuse(weights_SB, [logits_V[None, :NUM_SHARED] for logits_V in logits_SV], NUM_SHARED)
        torch.testing.assert_close(fused_RV[index, :NUM_SHARED], wanted_BV[0])
        torch.testing.assert_close(marks_XB[:3, index], weights_SB[:, 0])
        assert (fused_RV[index, NUM_SHARED:] == -torch.inf).all()


@pytest.mark.requires_cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("kind", [PAPER, "+".join(CHANGES)])
def test_rows_in_another_order_never_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The index of each was made on the device, for which the host waited until all specialists were done."""
    monkeypatch.setattr("ultrafuser.server.engine.worker.mixing.get_tp_group", lambda: SimpleNamespace(world_size=1))
    leader, follower = (
        [row._replace(position=int(row.is_draft)) for row in rows]  # as of new responses, of which nothing is kept
        for rows in (LEADER, FOLLOWER)
    )
    passes, _ = forward_passes([[*leader, UNFINISHED], [UNFINISHED, *follower], [*leader, UNFINISHED]])
    passes = [Rows(own.rows, own.hidden_RD.cuda(), own.logits_RV.cuda()) for own in passes]
    token_ids_RK = torch.tensor([[5, -1], [8, 9]], device="cuda")
    forcing = Forcing(sampler := SimpleNamespace(sample=lambda: (token_ids_RK[:, 0], None)))
    gate = fresh_gate((4, 4, 4), width=8, kind=GateKind.parse(kind)).cuda()
    mixer, clock = Mixer(GateParts(gate, range(3), 2, 2), NUM_SHARED), StepClock(token_ids_RK.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixer.fuse_into_leader(passes, leader, clock)
        in_order_of(FOLLOWER, token_ids_RK, LEADER)
        forcing.set({1: 13})
        sampler.sample()
        _as_numbers([Span("decode", "b", 0.1)], token_ids_RK.device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_followers_times_travel_as_numbers() -> None:
    spans = [Span("prefill", "b", 0.5), Span("idle", "b", 0.25)]
    told_2F = _as_numbers(spans, torch.device("cpu"))
    assert (told_2F.dtype, tuple(told_2F.shape)) == (torch.float32, (2, 4))
    assert _spans("b", told_2F) == spans


def record(**changes: float) -> StepRecord:
    """A step's record; `changes` are culprits by number of the row."""
    marks_BX = MARKS_BX.copy()
    for number, culprits in changes.items():
        marks_BX[int(number.removeprefix("row")), -1] = culprits
    return StepRecord(LEADER, marks_BX, [Span("gate", None, 0.1)])


def test_the_record_has_several_rows_of_a_request_in_order() -> None:
    step = record()
    assert step.rows_of([("two", 2), ("one", 1)]).tolist() == MARKS_BX[[1, 2, 0]].tolist()
    assert step.rows_of([("one", 1), ("gone", 0), ("two", 1)]).tolist() == MARKS_BX[[0, 1]].tolist()
    assert step.marks_of("two", 2).tolist() == MARKS_BX[1:, :4].tolist()
    assert step.marks_of("two", 1).tolist() == MARKS_BX[1:2, :4].tolist()


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_token_was_drafted_if_another_was_drawn_behind_it(num_tokens: int) -> None:
    """Also if the response ends with it, so that the other is not handed out."""
    marks_XB = torch.from_numpy(np.delete(MARKS_BX, 3, axis=1).T)
    decisions = {"two": Decision("leading"), "one": Decision(None, Undrafted.UNPAID)}
    on_the_way = StepOnTheWay(LEADER, marks_XB, StepClock(torch.device("cpu")), decisions)
    step = on_the_way.arrive({"one": 1, "two": num_tokens, "three": 0})
    is_right = int(num_tokens == 2)
    wanted_BX = MARKS_BX.copy()
    wanted_BX[:, 3] = [0, is_right, 0]
    assert step.marks_BX.tolist() == wanted_BX.tolist()
    for count in range(1, num_tokens + 1):
        one, two = step.rounds_of([("gone", 0), ("one", 1), ("two", count)])
        assert one == Round(0, None, 0, 0, 1, "unpaid")
        assert two == Round(1, "leading", 1, is_right, count, None)
    again = pickle.loads(pickle.dumps(step))
    assert (again.rows, again.decisions) == (step.rows, decisions)


def test_drafts_that_were_not_scheduled_are_no_drafts() -> None:
    marks_XB = torch.from_numpy(np.delete(MARKS_BX[:1], 3, axis=1).T)
    on_the_way = StepOnTheWay(LEADER[:1], marks_XB, StepClock(torch.device("cpu")), {"one": Decision("ngram")})
    assert on_the_way.arrive({"one": 1}).rounds_of([("one", 1)]) == [Round(0, None, 0, 0, 1, "cut")]


def test_a_step_without_rows_or_decisions_has_no_rounds() -> None:
    empty = StepOnTheWay([], None, StepClock(torch.device("cpu")), {}).arrive({"three": 0})
    assert empty.rounds_of([("three", 0)]) == []
    assert record().rounds_of([("two", 2), ("one", 1)]) == []


def test_each_bad_row_of_a_request_is_blamed() -> None:
    assert record(row1=1, row2=6).nonfinite == {"two": 7}
    assert record(row0=8, row2=2).nonfinite == {"one": 8, "two": 2}


def test_several_tokens_of_a_request_get_as_many_rows_of_marks() -> None:
    outputs = [EngineCoreOutput("two", [5, 6]), EngineCoreOutput("one", [4]), EngineCoreOutput("gone", [])]
    add_marks(outputs, record(), {"two", "gone"})
    assert outputs[0].routed_experts.tolist() == MARKS_BX[1:, :4].tolist()
    assert [output.routed_experts for output in outputs[1:]] == [None, None]
    short = EngineCoreOutput("two", [5])
    add_marks([short], record(), {"two"})
    assert short.routed_experts.tolist() == MARKS_BX[1:2, :4].tolist()


def test_parts_of_a_stream_take_several_rows_of_a_step_or_some_of_them() -> None:
    chunks = [MARKS_BX[:1, :4], MARKS_BX[1:, :4]]
    for counts in ([1, 2], [2, 1], [3], [1, 1, 1]):
        takeover, taken = Takeover(), []
        for count in counts:
            part = CompletionOutput(0, "", [0] * count, 0.0, None, routed_experts=History(chunks))
            takeover.take(part)
            assert len(part.gate_weights) == count
            taken += part.gate_weights.tolist()
        assert taken == MARKS_BX[:, :3].tolist()


def test_a_report_has_a_row_for_each_token_that_is_handed_out() -> None:
    outputs = {0: EngineCoreOutputs(outputs=[EngineCoreOutput("two", [5, 6]), EngineCoreOutput("one", [4])])}
    add_report(outputs, record(), [])
    seen: list[Any] = []
    processor = SimpleNamespace(
        request_states={"two": None, "one": None}, process_outputs=lambda _: None, update_scheduler_stats=seen.append
    )
    reports: list[StepReport] = []
    feed = StepFeed(processor, NAMES)
    feed.listen(reports.append)
    processor.process_outputs(outputs[0].outputs)
    processor.update_scheduler_stats(outputs[0].scheduler_stats)
    (report,) = reports
    assert report.weights_TS.tolist() == MARKS_BX[[1, 2, 0], :3].tolist()
    assert report.num_agreeing_T.tolist() == MARKS_BX[[1, 2, 0], 5].astype(int).tolist()


def test_a_given_response_gives_the_token_of_each_position() -> None:
    given = SamplingParams(extra_args={FORCED_TOKEN_IDS: [10, 11, 12, 13, 14]})
    states: Any = {"one": SimpleNamespace(sampling_params=SamplingParams())}
    states["two"] = SimpleNamespace(sampling_params=given)
    assert given_tokens(LEADER, states) == {1: 13, 2: 14}
    states["two"].sampling_params = SamplingParams(extra_args={FORCED_TOKEN_IDS: [10, 11, 12, 13]})
    assert given_tokens(LEADER, states) == {1: 13}, "the response ends before the draft"
    sampler = SimpleNamespace(sample=lambda: (torch.tensor([1, 2, 3]), None))
    forcing = Forcing(sampler)
    forcing.set(given_tokens(LEADER, states | {"two": SimpleNamespace(sampling_params=given)}))
    assert sampler.sample()[0].tolist() == [1, 13, 14]


def test_followers_get_all_tokens_of_a_request_in_their_own_order() -> None:
    token_ids_RK = torch.tensor([[5, -1], [8, 9]])
    assert in_order_of(LEADER, token_ids_RK, LEADER) is token_ids_RK, "nothing is copied in the common step"
    assert in_order_of(FOLLOWER, token_ids_RK, LEADER).tolist() == [[8, 9], [5, -1]]
    beside = [UNFINISHED._replace(slot=0), *(row._replace(slot=row.slot + 1) for row in LEADER)]
    assert in_order_of(beside, token_ids_RK, LEADER).tolist()[1:] == [[5, -1], [8, 9]]
