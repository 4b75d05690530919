"""Constraints that would hold up the engine are refused; all others pass, and are tried out once."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from vllm.sampling_params import StructuredOutputsParams

from ultrafuser.server.errors import InvalidRequest
from ultrafuser.server.requests.grammars import Constraint, GrammarCheck
from ultrafuser.server.serving.constraints import constraint_of, leading_vocabulary

SECONDS = 2.0
DEEP: dict[str, Any] = {"type": "string"}
for _ in range(20):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"]}


def wanted(**fields: Any) -> Constraint | None:
    """What vLLM's serving class would give to be tried out."""
    return constraint_of(StructuredOutputsParams(**fields))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def check(vllm_config: Any) -> AsyncIterator[GrammarCheck]:
    """One process for all tests of this module."""
    grammars = GrammarCheck(leading_vocabulary(vllm_config), SECONDS)
    yield grammars
    await grammars.close()


PASSING: list[dict[str, Any]] = [
    {"regex": "(a+)+b"},
    {"regex": "[a-z]{1,20}@[a-z]{1,20}"},
    {"json": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}}},
    {"json": '{"type": "object", "properties": {"self": {"$ref": "#"}}}'},
    {"json": DEEP},
    {"json_object": True},
    {"choice": ["red", "blue"]},
    {"grammar": 'root ::= "a" root | "b"'},
    {"json": {"type": "number", "multipleOf": 3}},
    {"grammar": "// ::= in a comment\nstart: A\nA: /[a-z]+/"},
    {
        "structural_tag": json.dumps(
            {
                "type": "structural_tag",
                "structures": [{"begin": "<a>", "schema": {"type": "integer"}, "end": "</a>"}],
                "triggers": ["<a"],
            }
        )
    },
]


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_quick_passes_and_is_tried_once(check: GrammarCheck) -> None:
    for constraint in PASSING:
        await check.check(wanted(**constraint))
    await check.close()
    for constraint in PASSING:
        await check.check(wanted(**constraint))
    assert check._process is None  # nobody was asked


AMBIGUOUS = "\n".join([*(f'r{i} ::= r{i + 1} r{i + 1} | "a"' for i in range(60)), 'r60 ::= "a"', "root ::= r0"])
LARGE: dict[str, Any] = {
    "type": "array",
    "items": {"enum": [f"value number {number}" * 20 for number in range(60_000)]},
}
STALLING: list[dict[str, Any]] = [
    {"grammar": AMBIGUOUS},
    {"json": LARGE},
    {
        "structural_tag": json.dumps(
            {
                "type": "structural_tag",
                "structures": [{"begin": "<a>", "schema": LARGE, "end": "</a>"}],
                "triggers": ["<a"],
            }
        )
    },
]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("constraint", STALLING, ids=["ambiguous", "large", "structures"])
async def test_what_would_hold_up_the_engine_is_refused_in_time(
    check: GrammarCheck, constraint: dict[str, Any]
) -> None:
    await check.check(wanted(regex="a"))  # the process has started
    with pytest.raises(InvalidRequest, match="simplify it") as refused:
        await check.check(wanted(**constraint))
    assert refused.value.param == f"structured_outputs.{next(iter(constraint))}"
    await check.check(wanted(regex="b"))


@pytest.mark.asyncio(loop_scope="module")
async def test_it_starts_anew_when_its_process_has_died(check: GrammarCheck) -> None:
    await check.check(wanted(regex="c"))
    process = check._process
    assert process is not None
    process.kill()
    await process.wait()
    await check.check(wanted(regex="d"))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_client_that_leaves_ends_nothing_that_others_wait_for(check: GrammarCheck) -> None:
    await check.check(wanted(regex="e"))
    process = check._process
    leaving = asyncio.create_task(check.check(wanted(regex="f{1,200}")))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await check.check(wanted(regex="g"))
    assert check._process is process


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_known_waits_for_no_trial_and_a_client_that_leaves_the_queue_has_nothing_tried(
    check: GrammarCheck,
) -> None:
    """Clients that sent and left could fill the queue with trials, each of which may take the whole time."""
    await check.check(wanted(regex="known"))
    with pytest.raises(InvalidRequest):
        await check.check(wanted(regex="(?=known)refused"))
    slow = asyncio.create_task(check.check(wanted(json=LARGE)))
    await asyncio.sleep(0.05)
    leaving = [asyncio.create_task(check.check(wanted(regex=f"left{number}"))) for number in range(3)]
    await asyncio.sleep(0.05)
    for task in leaving:
        task.cancel()
    await check.check(wanted(regex="known"))
    with pytest.raises(InvalidRequest):
        await check.check(wanted(regex="(?=known)refused"))
    assert not slow.done()
    with pytest.raises(InvalidRequest, match="simplify it"):
        await slow
    num_known = len(check._verdicts)
    await check.check(wanted(regex="new"))
    assert len(check._verdicts) == num_known + 1
