"""The gate's weights in responses: asked for by a field of the request, given beside `logprobs`, a row for each token.

Works on what vLLM's serving classes are given and give back: engine outputs on one side, response objects and events
on the other. Knows no engine; absent fields cost nothing.

    "specialists": ["text", "code", "math"],                                   once, in the response or its first event
    "choices": [{"gate_weights": {"content": [[0.1, 0.8, 0.1], ...],           of the choice's (or the event's) tokens
                                  "mean": [0.2, 0.7, 0.1]}}]                   over all tokens; in the last event
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import numpy as np
from vllm.outputs import CompletionOutput

from ultrafuser.server.requests.weights_field import GATE_WEIGHTS

_DIGITS = 6


def add_to_choices(response: Any, specialists: Sequence[str], completions: Sequence[CompletionOutput]) -> None:
    """Put the weights into a whole response, whose choices are these completions in order."""
    response.specialists = list(specialists)
    for choice, completion in zip(response.choices, completions, strict=True):
        weights: Any = completion.gate_weights
        rows = [] if weights is None else _rows(weights)
        choice.gate_weights = {"content": rows, "mean": _mean(rows)}


class WeightsInEvents:
    """One stream's weights: collected from the engine's outputs, given to the events that carry their tokens.

    vLLM is asked to name the tokens of every event, which says whose weights belong into it; where the client has not
    asked for the names they are taken out again.
    """

    def __init__(self, request: Any, specialists: Sequence[str], prompts: Sequence[str | None] = ()) -> None:
        """Changes `request.return_token_ids`; `prompts` are the texts that a completion may have to echo."""
        self._specialists = list(specialists)
        self._shows_token_ids = bool(request.return_token_ids)
        # vLLM echoes no text beside token ids; a client that has not asked for ids gets its text from here.
        self._echoed = list(prompts) if request.echo and not self._shows_token_ids else []
        self._num_choices = request.n or 1
        self._rows: dict[int, list[list[float]]] = {}
        self._given: dict[int, int] = {}
        self._is_first = True
        request.return_token_ids = True

    async def watch(self, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Pass the engine's outputs on; where there are several prompts each comes with its prompt's number."""
        async for item in outputs:
            prompt, output = item if isinstance(item, tuple) else (0, item)
            for completion in output.outputs:
                if completion.gate_weights is not None:
                    rows = self._rows.setdefault(prompt * self._num_choices + completion.index, [])
                    rows += _rows(completion.gate_weights)
            yield item

    async def decorated(self, events: AsyncIterator[str]) -> AsyncGenerator[str, None]:
        """The events, each with the weights of its tokens."""
        async for event in events:
            yield self._with_weights(event)

    def _with_weights(self, event: str) -> str:
        text = event.removeprefix("data: ").strip()
        if text == "[DONE]":
            return event
        chunk: dict[str, Any] = json.loads(text)
        if self._is_first:
            chunk["specialists"] = self._specialists
            self._is_first = False
        if not self._shows_token_ids:
            chunk.pop("prompt_token_ids", None)
        for choice in chunk.get("choices", []):
            self._decorate(choice)
        return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def _decorate(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        token_ids = choice.get("token_ids") or []
        if not self._shows_token_ids:
            choice.pop("token_ids", None)
            choice.pop("prompt_token_ids", None)
        rows = self._rows.get(index, [])
        if self._echoed and index not in self._given:
            choice["text"] = (self._echoed[index // self._num_choices] or "") + choice["text"]
        begin = self._given.get(index, 0)
        end = self._given[index] = begin + len(token_ids)
        own: dict[str, Any] = {"content": rows[begin:end]} if token_ids else {}
        if choice.get("finish_reason") is not None:
            own |= {"mean": _mean(rows)}
        if own:
            choice[GATE_WEIGHTS] = {"content": [], **own}


def _rows(weights_TS: Any) -> list[list[float]]:
    return [[round(weight, _DIGITS) for weight in row] for row in weights_TS.tolist()]


def _mean(rows: Sequence[Sequence[float]]) -> list[float] | None:
    return [round(float(weight), _DIGITS) for weight in np.mean(rows, axis=0)] if rows else None
