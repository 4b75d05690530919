"""The specialists' own prompts on their way through vLLM: one key in a request's sampling parameters.

Knows where the n prompts of a request travel, not how they were rendered. The key is ours alone: a user
who sends it is refused where requests enter (`inputs.py`).
"""

from collections.abc import Sequence
from typing import Any

from vllm.sampling_params import SamplingParams

SPECIALIST_PROMPTS = "specialist_prompts"
"""Key in `SamplingParams.extra_args` and in engine inputs: n lists of token ids, in the fusion file's order."""


def specialist_prompts(params: SamplingParams, index: int, canonical: Sequence[int]) -> list[int]:
    """The own prompt of specialist `index`; the canonical one when the request carries a single prompt."""
    prompts = (params.extra_args or {}).get(SPECIALIST_PROMPTS)
    return list(canonical if prompts is None else prompts[index])


def all_prompts(params: SamplingParams, canonical: Sequence[int]) -> list[list[int]]:
    """All n own prompts; the canonical one alone when every specialist reads the same."""
    prompts = (params.extra_args or {}).get(SPECIALIST_PROMPTS)
    return [list(canonical)] if prompts is None else [list(prompt) for prompt in prompts]


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
