"""vLLM's structured outputs in our own terms: which constraint is tried out, and on whose vocabulary."""

from vllm.config import VllmConfig
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.request import get_structured_output_key
from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

from ultrafuser.server.requests.grammars import Constraint, Vocabulary


def leading_vocabulary(config: VllmConfig) -> Vocabulary:
    """The vocabulary of the engine's leader."""
    model = config.model_config
    any_whitespace = not config.structured_outputs_config.disable_any_whitespace
    return Vocabulary(model.tokenizer, model.tokenizer_revision, model.get_vocab_size(), any_whitespace)


def constraint_of(params: StructuredOutputsParams | None) -> Constraint | None:
    """What there is to try out; None without a constraint, and for JSON without a schema."""
    if params is None or params.json_object or params.all_constraints_none():
        return None
    if params.choice is not None:
        return Constraint(StructuredOutputOptions.GRAMMAR.name, choice_as_grammar(params.choice))
    kind, text = get_structured_output_key(params)
    is_lark = kind == StructuredOutputOptions.GRAMMAR and grammar_is_likely_lark(text)
    return Constraint("LARK" if is_lark else kind.name, text)
