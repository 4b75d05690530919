"""The engine's one backend of structured output: xgrammar, given what `server/grammar/` makes of a constraint, which
holds from the end of a thought on.

vLLM keeps one backend for an engine, that of the first constraint, while it chooses one for each request: what a
constraint did would depend on what was asked before.
"""

from functools import partial
from typing import Any

import xgrammar
from vllm.config import VllmConfig
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar

from ultrafuser.server.engine.core.thought_grammar import behind_thought
from ultrafuser.server.engine.shared.constraint_kind import named_kind
from ultrafuser.server.engine.shared.spec import EngineSpec
from ultrafuser.server.engine.shared.thought import thought_of
from ultrafuser.server.grammar.compiling import compiled


class GrammarBackend(XgrammarBackend):
    """vLLM's, but for how a constraint becomes a grammar."""

    def compile_grammar(
        self, request_type: StructuredOutputOptions, grammar_spec: str, stop_token_ids: set[int] | None = None
    ) -> Any:
        """The grammar of one request.

        Raises:
            ConstraintError: it cannot be compiled, kept or fulfilled; a server has found that out before.
        """
        max_whitespace = EngineSpec.from_vllm_config(self.vllm_config).max_whitespace
        grammar = compiled(self.compiler, *named_kind(request_type, grammar_spec), max_whitespace)
        matcher = xgrammar.GrammarMatcher(
            grammar, override_stop_tokens=list(stop_token_ids) if stop_token_ids else None
        )
        return XgrammarGrammar(vocab_size=self.vocab_size, matcher=matcher, ctx=grammar)


def use_one_backend(manager: StructuredOutputManager, config: VllmConfig) -> None:
    """Give an engine its backend before the first constraint chooses one."""
    manager.backend = GrammarBackend(
        config, tokenizer=manager.tokenizer, vocab_size=config.model_config.get_vocab_size()
    )
    create = partial(StructuredOutputManager._create_grammar, manager)
    eos_token_ids = EngineSpec.from_vllm_config(config).eos_token_ids
    manager._create_grammar = lambda request: behind_thought(
        create(request), thought_of(request.sampling_params), eos_token_ids
    )
