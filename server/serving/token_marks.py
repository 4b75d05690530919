"""What responses tell of each token beside `logprobs`: the gate's weights, and whether the token was drafted.

Asked for by a field of the request and given by a field of the same name in every choice. Works on what vLLM's serving
classes are given and give back: engine outputs on one side, response objects and events on the other. Knows no engine;
absent fields cost nothing.

    "specialists": ["text", "code", "math"],              beside weights: once, in the response or its first event
    "choices": [{"gate_weights": {"content": [[0.1, 0.8, 0.1], ...],      of the choice's (or the event's) tokens
                                  "mean": [0.2, 0.7, 0.1]},               over all tokens; in the last event
                 "drafted": {"content": [false, true, ...], "mean": 0.6}}]
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import numpy as np
from vllm.outputs import CompletionOutput

from ultrafuser.server.requests.mark_fields import DRAFTED, GATE_WEIGHTS, asked_marks

_DIGITS = 6


def add_to_choices(
    request: Any, response: Any, specialists: Sequence[str], completions: Sequence[CompletionOutput]
) -> None:
    """Put what was asked for into a whole response, whose choices are these completions in order."""
    asked = asked_marks(request)
    if GATE_WEIGHTS in asked:
        response.specialists = list(specialists)
    for choice, completion in zip(response.choices, completions, strict=True):
        for name in asked:
            marks = _marks(completion, name)
            setattr(choice, name, {"content": marks, "mean": _mean(marks)})


class MarksInEvents:
    """One stream's marks: collected from the engine's outputs, given to the events that carry their tokens.

    vLLM is asked to name the tokens of every event, which says whose marks belong into it; where the client has not
    asked for the names they are taken out again.
    """

    def __init__(self, request: Any, specialists: Sequence[str], prompts: Sequence[str | None] = ()) -> None:
        """Changes `request.return_token_ids`; `prompts` are the texts that a completion may have to echo."""
        self._shows_token_ids = bool(request.return_token_ids)
        # vLLM echoes no text beside token ids; a client that has not asked for ids gets its text from here.
        self._echoed = list(prompts) if request.echo and not self._shows_token_ids else []
        self._hides_token_ids = not getattr(request, "include_reasoning", True)
        self._num_choices = request.n or 1
        self._marks: dict[str, dict[int, list[Any]]] = {name: {} for name in asked_marks(request)}
        self._given: dict[int, int] = {}
        self._head = {"specialists": list(specialists)} if GATE_WEIGHTS in self._marks else {}
        request.return_token_ids = True

    async def watch(self, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Pass the engine's outputs on; where there are several prompts each comes with its prompt's number."""
        async for item in outputs:
            prompt, output = item if isinstance(item, tuple) else (0, item)
            for completion in output.outputs:
                for name, marks in self._marks.items():
                    own = marks.setdefault(prompt * self._num_choices + completion.index, [])
                    own += _marks(completion, name)
            yield item

    async def decorated(self, events: AsyncIterator[str]) -> AsyncGenerator[str, None]:
        """The events, each with the marks of its tokens."""
        async for event in events:
            yield self._with_marks(event)

    def _with_marks(self, event: str) -> str:
        text = event.removeprefix("data: ").strip()
        if text == "[DONE]":
            return event
        chunk: dict[str, Any] = json.loads(text) | self._head
        self._head = {}
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
        if self._echoed and index not in self._given:
            choice["text"] = (self._echoed[index // self._num_choices] or "") + choice["text"]
        begin = self._given.get(index, 0)
        is_last = choice.get("finish_reason") is not None
        end = begin + len(token_ids)
        if self._hides_token_ids:  # vLLM does, of a thought that is left out and of all behind it
            end = max((len(marks.get(index, [])) for marks in self._marks.values()), default=0)
        self._given[index] = end
        for name, marks in self._marks.items() if end > begin or is_last else ():
            own = marks.get(index, [])
            choice[name] = {"content": own[begin:end]} | ({"mean": _mean(own)} if is_last else {})


def _marks(completion: CompletionOutput, name: str) -> list[Any]:
    """What is told of each token of a completion."""
    marks: Any = completion.drafted if name == DRAFTED else completion.gate_weights
    if marks is None:
        return []
    told: list[Any] = marks.tolist()
    return told if name == DRAFTED else [[round(weight, _DIGITS) for weight in row] for row in told]


def _mean(marks: Sequence[Any]) -> Any:
    """Of each specialist's weights, or the share of drafted tokens; None if there is no token."""
    return np.mean(marks, axis=0).round(_DIGITS).tolist() if marks else None
