"""What of ours travels with a request through vLLM, in `SamplingParams.extra_args`: prompts, a given response, wishes.

Knows the keys and what they hold, not how prompts were rendered. Prompts and given responses are the server's own to
send: a user who does so is refused where requests enter.
"""

from typing import Any

from vllm.inputs import EngineInput, tokens_input
from vllm.sampling_params import SamplingParams

SPECIALIST_PROMPTS = "specialist_prompts"
"""Key, of engine inputs too: n lists of token ids, in the fusion file's order."""

FORCED_TOKEN_IDS = "forced_token_ids"
"""Key: the tokens of a response that is given, not sampled."""

GATE_WEIGHTS = "gate_weights"
"""Key: true asks for the gate's weights of every token of this request."""

DRAFTED = "drafted"
"""Key: true asks of every token of this request whether it was drafted; both wishes travel as one."""


def fused_input(prompts: list[list[int]]) -> EngineInput:
    """An engine input from one prompt of token ids per specialist; the longest is canonical."""
    return {**tokens_input(max(prompts, key=len)), SPECIALIST_PROMPTS: prompts}


def specialist_prompts(params: SamplingParams) -> list[list[int]] | None:
    """The n own prompts of a request; None if every specialist reads the canonical one."""
    return (params.extra_args or {}).get(SPECIALIST_PROMPTS)


def forced_token_ids(params: SamplingParams | None) -> list[int] | None:
    """The given response of a request; None if it is to be sampled."""
    return (params.extra_args or {}).get(FORCED_TOKEN_IDS) if params is not None else None


def wants_marks(params: SamplingParams | None) -> bool:
    """Whether a request asked for anything that is told of each token."""
    asked = (params.extra_args or {}) if params is not None else {}
    return bool(asked.get(GATE_WEIGHTS) or asked.get(DRAFTED))


class Unprinted(list[Any]):
    """A list that keeps its items to itself: an engine that fails writes its requests' parameters into the log."""

    def __repr__(self) -> str:
        return f"<{len(self)} items>"


def conceal_tokens(params: SamplingParams) -> None:
    """Keep what a request says, prompts and a given response, out of the log; vLLM does so with its own field."""
    if params.extra_args:
        params.extra_args = {
            key: Unprinted(value) if isinstance(value, list) else value for key, value in params.extra_args.items()
        }
