"""What a request demands of its response, in our own terms: constraints, their fields, and on whose vocabulary."""

import json
from collections.abc import Iterator
from copy import deepcopy
from functools import lru_cache
from typing import Any

from vllm.config import VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionNamedToolChoiceParam, ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output import backend_xgrammar

from ultrafuser.server.engine.shared.constraint_kind import kind_and_text
from ultrafuser.server.engine.shared.spec import EngineSpec
from ultrafuser.server.grammar.rewriting import kept_schema
from ultrafuser.server.requests.grammars import MAX_REMEMBERED, Constraint, Vocabulary

# vLLM holds constraints against its own way of compiling them, in the event loop, which nothing can stop.
backend_xgrammar.validate_xgrammar_grammar = lambda params: None

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
"""The parameters of a tool that has none."""

_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


def leading_vocabulary(config: VllmConfig) -> Vocabulary:
    """The vocabulary of the engine's leader."""
    model, spec = config.model_config, EngineSpec.from_vllm_config(config)
    return Vocabulary(
        model.tokenizer,
        model.tokenizer_revision,
        model.get_vocab_size(),
        spec.num_shared_ids,
        spec.eos_token_ids,
        spec.max_whitespace,
    )


def constraint_of(params: StructuredOutputsParams | None, field: str | None = None) -> Constraint | None:
    """What there is to try out; None without a constraint. Its field is `structured_outputs.KIND` if none is given."""
    if params is None or params.all_constraints_none():
        return None
    own = next(name for name in _KINDS if getattr(params, name) is not None)
    return Constraint(*kind_and_text(params), field or f"structured_outputs.{own}")


def constraint_in(request: ChatCompletionRequest | CompletionRequest) -> Constraint | None:
    """The constraint that a request brings itself: its `response_format`, or else its `structured_outputs`."""
    is_format = request.response_format is not None and request.response_format.type != "text"
    return constraint_of(request.extract_structured_outputs(), "response_format" if is_format else None)


def demands_call(request: ChatCompletionRequest) -> bool:
    """Whether the response has to be a call of a tool."""
    choice = request.tool_choice
    return choice == "required" or isinstance(choice, ChatCompletionNamedToolChoiceParam)


def tools_held_to(request: ChatCompletionRequest) -> Iterator[tuple[int, Any]]:
    """Tools whose parameters a call has to follow, by their number: strict ones, and those that are demanded.

    A tool that is only offered is not held to its parameters, nor is one that says `"strict": false`.
    """
    choice, is_demanded = request.tool_choice, demands_call(request)
    for number, tool in enumerate(request.tools or ()):
        function = getattr(tool, "function", None)
        if function is None or choice in (None, "none"):
            continue
        if isinstance(choice, ChatCompletionNamedToolChoiceParam) and choice.function.name != function.name:
            continue
        if function.strict or (is_demanded and function.strict is None):
            yield number, function


def constraints_of_tools(request: ChatCompletionRequest) -> Iterator[Constraint]:
    """The parameters that a call has to follow, each by itself."""
    for number, function in tools_held_to(request):
        if function.parameters:
            yield Constraint("JSON", json.dumps(function.parameters), f"tools[{number}].function.parameters")


def keep_parameters(request: ChatCompletionRequest) -> None:
    """Rewrite the parameters that a call has to follow, which may take seconds: not to be done in the event loop, where
    vLLM asks for them once they are remembered."""
    for number, function in tools_held_to(request):
        _kept_parameters(_written(function), number)


@lru_cache(maxsize=MAX_REMEMBERED)
def _kept_parameters(parameters: str, number: int) -> str:
    return json.dumps(kept_schema(json.loads(parameters), f"t{number}_"))


def _written(function: Any) -> str:
    return json.dumps(function.parameters or NO_ARGUMENTS)


def held_to_tools(parser: type) -> type:
    """One of vLLM's parsers, whose constraint for a call follows the parameters of the tools that are demanded.

    vLLM's leaves those free that are not strict, and breaks references where it puts several schemas into one.
    """

    class HeldToTools(parser):
        def adjust_request(self, request: Any) -> Any:
            tools = request.tools
            if isinstance(request, ChatCompletionRequest) and tools:
                request.tools = deepcopy(tools)
                for number, function in list(tools_held_to(request)):
                    function.strict = True
                    function.parameters = json.loads(_kept_parameters(_written(function), number))
            try:
                return super().adjust_request(request)
            finally:
                request.tools = tools

    return HeldToTools
