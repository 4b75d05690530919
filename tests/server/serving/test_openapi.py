"""What /openapi.json promises is kept, whatever is sent: schemathesis makes up right and wrong requests from it."""

from collections import Counter
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import StopReason, from_schema
from schemathesis.engine.events import EngineFinished, FatalError, NonFatalError, ScenarioFinished

from tests.server.scripted import ScriptedEngine
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.server.app import create_app
from ultrafuser.server.health import Readiness
from ultrafuser.server.serving.serving import build_serving
from ultrafuser.server.settings import ServerSettings

pytestmark = [
    # vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
    # Said of a strategy whenever any other thread draws a random number at the same time, the application's included.
    pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies"),
]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
CONFIG: dict[str, Any] = {
    "seed": 1,
    "generation": {"mode": "all", "max-examples": 5, "deterministic": True},
    "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}},
    "phases": {"coverage": {"enabled": True}, "stateful": {"enabled": False}},
}


@pytest.fixture(scope="module")
def schema(vllm_config: Any, fusion: FusionConfig, info: FusedModelInfo) -> Any:
    """The schema of the app over an engine that answers every request with the same tokens."""
    settings = ServerSettings()
    serving = build_serving(ScriptedEngine(vllm_config), fusion, info, settings)
    app = create_app(serving, settings, Readiness(is_warm=True))
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=SchemathesisConfig.from_dict(CONFIG))


def test_no_request_gets_a_server_error_or_an_answer_that_is_not_described(schema: Any) -> None:
    statuses: Counter[tuple[str, int]] = Counter()
    for event in from_schema(schema).execute():
        if isinstance(event, NonFatalError | FatalError):
            raise AssertionError(event) from (event.value if isinstance(event, NonFatalError) else event.exception)
        if isinstance(event, ScenarioFinished):
            for interaction in event.recorder.interactions.values():
                assert interaction.response is not None
                statuses[event.recorder.label, interaction.response.status_code] += 1
        if isinstance(event, EngineFinished):
            assert [f"{failure.operation}: {failure.message}" for failure in event.failures] == []
            assert event.stop_reason == StopReason.COMPLETED
    bodiless = {"POST /v1/responses/{response_id}/cancel"}
    posts = {label for label, _ in statuses if label.startswith("POST")} - bodiless
    assert len(posts) == 8
    for label in posts:
        assert statuses[label, 400] > 10
