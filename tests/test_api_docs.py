"""docs/api.md lists what there is: routes, the fields of vLLM's request models, error codes, limits."""

import re
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from ultrafuser.server import dialects, errors, metrics
from ultrafuser.server.access import connections, middleware
from ultrafuser.server.app import ROUTERS
from ultrafuser.server.engine.shared.step import NONFINITE_OUTPUT
from ultrafuser.server.requests.anthropic_bodies import CountTokensRequest, MessagesRequest
from ultrafuser.server.requests.blocks import BILLING_HEADER
from ultrafuser.server.requests.bodies import MAX_DEPTH
from ultrafuser.server.requests.responses_request import ResponsesRequest
from ultrafuser.server.requests.unsupported import (
    CHAT_REFUSALS,
    COMPLETION_REFUSALS,
    MESSAGES_REFUSALS,
    RESPONSES_REFUSALS,
    Refusal,
)
from ultrafuser.server.serving import step_metrics, translation
from ultrafuser.server.serving.message_answers import StopReason
from ultrafuser.server.serving.responses.event_types import ResponseEvent
from ultrafuser.server.serving.responses.input_items import CLIENT_CALLS, LEFT_OUT, REFUSED_KINDS, RESULTS
from ultrafuser.server.settings import Limits

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
ENDPOINTS = {
    "POST /v1/chat/completions": (ChatCompletionRequest, CHAT_REFUSALS),
    "POST /v1/completions": (CompletionRequest, COMPLETION_REFUSALS),
    "POST /v1/messages": (MessagesRequest, MESSAGES_REFUSALS),
    "POST /v1/responses": (ResponsesRequest, RESPONSES_REFUSALS),
}
PARTLY_REFUSED = {"chat_template_kwargs", "vllm_xargs", "echo"}
"""Fields that work, but not with every value."""


def rows(section: str) -> dict[str, str]:
    """First and second column of a section's tables, but for those of its subsections."""
    return dict(re.findall(r"^\| `(.+?)` \| (.*?) \|", SECTIONS[section].split("\n### ")[0], re.MULTILINE))


def test_every_route_is_listed_and_exists() -> None:
    routes = [route for router in ROUTERS for route in router.routes]
    known = {f"{method} {route.path}" for route in routes for method in route.methods}
    assert set(rows("Routes")) == {name.replace(":path}", "}") for name in known}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_field_has_a_row_that_says_what_becomes_of_it(endpoint: str) -> None:
    model, refusals = ENDPOINTS[endpoint]
    _check_fields(rows(endpoint), model, refusals)


def _check_fields(listed: dict[str, str], model: type[BaseModel], refusals: tuple[Refusal, ...]) -> None:
    assert set(listed) == set(model.model_fields)
    assert set(listed.values()) == {"works", "refused", "no effect"}
    refused = {refusal.param for refusal in refusals} & set(model.model_fields)
    assert {name for name, fate in listed.items() if fate == "refused"} == refused - PARTLY_REFUSED


def test_the_page_says_what_becomes_of_messages() -> None:
    section = SECTIONS["POST /v1/messages"]
    assert set(rows("POST /v1/messages/count_tokens")) == set(CountTokensRequest.model_fields)
    own = {refusal.param for refusal in MESSAGES_REFUSALS} - {refusal.param for refusal in CHAT_REFUSALS}
    assert [param for param in own if f"`{param}`" not in section] == []
    reasons = re.findall(r"^\| `(\w+)` \|", section.split("### Answers")[1].split("### Events")[0], re.MULTILINE)
    assert reasons == ["stop_reason", *sorted(get_args(StopReason), key=reasons.index)]
    kinds = re.findall(r"^\| (\d+) \| `(\w+)` \|$", section, re.MULTILINE)
    assert {int(status): kind for status, kind in kinds} == {**dialects._ANTHROPIC_TYPES, 500: "api_error"}
    assert f"at most {dialects.ANTHROPIC.longest_silence_seconds} s" in section
    assert f"`{BILLING_HEADER}`" in section


@pytest.mark.parametrize("endpoint", ["POST /v1/chat/completions", "POST /v1/responses"])
def test_what_is_refused_beyond_the_models_fields_is_named(endpoint: str) -> None:
    section, (model, refusals) = SECTIONS[endpoint], ENDPOINTS[endpoint]
    params = {refusal.param for refusal in refusals} - set(model.model_fields)
    assert [param for param in sorted(params) if f"`{param}`" not in section] == []


def test_every_kind_of_item_is_listed() -> None:
    listed = re.findall(
        r"`(\w+)`", " ".join(re.findall(r"^\| (`.+?) \|", SECTIONS["Responses API: items"], re.MULTILINE))
    )
    kinds = {"message", "agent_message", "function_call", "custom_tool_call", "additional_tools", "reasoning"}
    assert {*listed} == kinds | {*CLIENT_CALLS} | {*RESULTS} | LEFT_OUT | {*REFUSED_KINDS}


def test_every_event_of_a_response_is_listed() -> None:
    events = get_args(ResponseEvent.model_fields["root"].annotation)
    names = {name for event in events for name in get_args(event.model_fields["type"].annotation)}
    assert set(re.findall(r"`(response\.[\w.]+|error)`", SECTIONS["Responses API: events"])) == names


def test_every_error_code_is_listed() -> None:
    codes = set(re.findall(r"^\| \d{3} \| `(\w+)` \|", SECTIONS["Errors"], re.MULTILINE))
    classes: list[type[errors.ApiError]] = [errors.ApiError]
    for kind in classes:
        classes += kind.__subclasses__()
    own = {kind.code for kind in classes} | set(translation._CODES.values())
    assert codes == (own | {"model_not_found", "engine_dead", NONFINITE_OUTPUT}) - {None}


def test_every_limit_is_listed() -> None:
    assert set(rows("Requests in general")) == {f"--{name.replace('_', '-')}" for name in Limits.model_fields}
    section = SECTIONS["Requests in general"]
    assert f"more than {MAX_DEPTH} levels" in section
    assert f"{connections.MAX_HEADER_BYTES // 1024} KiB\nand {middleware.MAX_HEADERS} lines of headers" in section


def _exported() -> set[str]:
    """Our metrics with their labels, as the page writes them."""
    found = set()
    for metric in [*vars(metrics).values(), *vars(step_metrics).values()]:
        if isinstance(metric, step_metrics.BulkHistogram):
            name, labels = metric._family[0], metric._labels
        elif isinstance(metric, MetricWrapperBase):
            name = metric._name + ("_total" if isinstance(metric, Counter) else "")
            labels = list(metric._labelnames)
        else:
            continue
        found.add(name + (f"{{{','.join(labels)}}}" if labels else ""))
    return found


def test_every_metric_is_listed_with_its_labels() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    listed = {
        name for row in re.findall(r"^\| (`fused_.+?) \|", page, re.MULTILINE) for name in row[1:-1].split("`, `")
    }
    assert listed == _exported()
