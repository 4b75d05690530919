"""Has the conversations of benchmarks with a server, at temperature 0. Does not know what is asked of it, or why."""

import time
from typing import Any

from ultrafuser.gating.commands.chat_completion import Completion, RequestFailedError
from ultrafuser.gating.commands.endpoint import Endpoint
from ultrafuser.gating.evaluation.benchmarks.items import Answer, Request

# The server says no more than 20 candidates by its defaults, and so does OpenAI.
_NUM_CANDIDATES = 20


class ChatClient(Endpoint):
    """Chat completions of one model at temperature 0. An asynchronous context manager."""

    async def answer(self, request: Request, model: str, max_tokens: int) -> Answer:
        """Have a conversation; a failure is an answer too, with its reason.

        Raises:
            EndpointError: no request can succeed: nothing listens there, or key or model are refused.
        """
        messages: list[dict[str, str]] = []
        completions: list[Completion] = []
        error, is_final = None, True
        try:
            for turn in request.turns:
                messages.append({"role": "user", "content": turn})
                completion = await self._complete(request, model, max_tokens, messages)
                completions.append(completion)
                messages.append({"role": "assistant", "content": completion.text})
        except RequestFailedError as failure:
            error, is_final = str(failure), failure.is_final
        return Answer(
            id=request.id,
            texts=tuple(completion.text for completion in completions),
            finish_reasons=tuple(completion.finish_reason for completion in completions),
            top_logprobs=completions[0].top_logprobs if completions else None,
            error=error,
            is_final=is_final,
            time=round(time.time(), 3),
        )

    async def _complete(
        self, request: Request, model: str, max_tokens: int, messages: list[dict[str, str]]
    ) -> Completion:
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": request.max_tokens or max_tokens,
        }
        logprobs = {"logprobs": True, "top_logprobs": _NUM_CANDIDATES} if request.wants_logprobs else {}
        try:
            return await self.complete({**body, **logprobs})
        except RequestFailedError as failure:
            if not (logprobs and failure.is_final and "logprob" in str(failure)):
                raise
            return await self.complete(body)  # a server without them
