"""The API's schema at /openapi.json: FastAPI's, with the events of streams and without statuses that never occur."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from openai.types.responses import Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse, ChatCompletionStreamResponse
from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionStreamResponse
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeResponse, TokenizeResponse

from ultrafuser.server.serving.message_answers import Message, MessageEvent, TokenCount
from ultrafuser.server.serving.responses.event_types import ResponseEvent

_ANSWERS: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionResponse,
    "/v1/completions": CompletionResponse,
    "/v1/messages": Message,
    "/v1/messages/count_tokens": TokenCount,
    "/v1/responses": Response,
    "/v1/models": ModelList,
    "/v1/models/{name:path}": ModelCard,
    "/tokenize": TokenizeResponse,
    "/detokenize": DetokenizeResponse,
}

STREAMS: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionStreamResponse,
    "/v1/completions": CompletionStreamResponse,
    "/v1/messages": MessageEvent,
    "/v1/responses": ResponseEvent,
}
"""Routes that answer with events if `stream` is set, and what the data of each event is."""

_REFERENCE = "#/components/schemas/{model}"


def answer(path: str) -> dict[int | str, dict[str, Any]]:
    """What the schema says of a route's answers; for its `responses`."""
    return {200: {"model": _ANSWERS[path]}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The schema of all routes; made once."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        chunks = [(model, "serialization") for model in STREAMS.values()]
        _, models = models_json_schema(chunks, ref_template=_REFERENCE)  # type: ignore[arg-type]
        schema["components"]["schemas"] |= models["$defs"]
        for path, model in STREAMS.items():
            content = schema["paths"][path]["post"]["responses"]["200"]["content"]
            content["text/event-stream"] = {"itemSchema": _event(model)}
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own; here it is 400
    return app.openapi_schema or {}


def _event(model: type[BaseModel]) -> dict[str, Any]:
    """One server-sent event, in OpenAPI 3.2's words, which older readers pass over; the last one's data is [DONE]."""
    chunk = {"$ref": _REFERENCE.format(model=model.__name__)}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": chunk}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}
