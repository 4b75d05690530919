"""The constraint in vLLM's sampling parameters, in the terms of `server/grammar/`: the same for trial and engine."""

from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.request import get_structured_output_key
from vllm.v1.structured_output.utils import grammar_is_likely_lark


def kind_and_text(params: StructuredOutputsParams) -> tuple[str, str]:
    """The kind and the text of a constraint."""
    return named_kind(*get_structured_output_key(params))


def named_kind(option: StructuredOutputOptions, text: str) -> tuple[str, str]:
    """What vLLM calls a grammar is in EBNF, or in Lark's syntax."""
    is_lark = option == StructuredOutputOptions.GRAMMAR and grammar_is_likely_lark(text)
    return "LARK" if is_lark else option.name, text
