"""A grammar behind a thought: what it lets through, and that going back is as if it had never gone on."""

import random
from typing import Any

import pytest
import torch
import xgrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from tests.fakes import EOS_ID, build_tokenizer
from ultrafuser.server.engine.core.thought_grammar import ThoughtGrammar
from ultrafuser.server.engine.shared.thought import Opening, Thought

VOCABULARY = 320
START, END, CALL = 317, 318, 319


@pytest.fixture(scope="module")
def compiled() -> Any:
    """Words of a and b."""
    info = xgrammar.TokenizerInfo.from_huggingface(build_tokenizer(320, 320, "text"), vocab_size=VOCABULARY)
    return xgrammar.GrammarCompiler(info).compile_regex("[ab]{4,}")


def grammar_of(compiled: Any, opening: Opening, implicit: tuple[int, ...] = ()) -> ThoughtGrammar:
    """A fresh one."""
    matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=[EOS_ID], max_rollback_tokens=64)
    own = XgrammarGrammar(vocab_size=VOCABULARY, matcher=matcher, ctx=compiled)
    return ThoughtGrammar(own, Thought(opening, START, END, implicit), frozenset({EOS_ID}))


def allowed(grammar: ThoughtGrammar) -> set[int]:
    """The tokens that may come next."""
    bits = torch.zeros(2, VOCABULARY // 32, dtype=torch.int32)
    grammar.fill_bitmask(bits, 1)
    assert not bits[0].any()
    return {index for index in range(VOCABULARY) if int(bits[1, index // 32]) >> index % 32 & 1}


@pytest.fixture(scope="module")
def letters() -> list[int]:
    """Tokens of which the answer is made."""
    tokenizer = build_tokenizer(320, 320, "text")
    vocabulary = tokenizer.get_vocab()
    return [vocabulary["a"], vocabulary["b"]]


def test_all_but_the_end_of_the_response_may_be_thought(compiled: Any, letters: list[int]) -> None:
    grammar = grammar_of(compiled, "open")
    assert allowed(grammar) == set(range(VOCABULARY)) - {EOS_ID}
    assert grammar.accept_tokens("r", [7, 8, START, 9])
    assert allowed(grammar) == set(range(VOCABULARY)) - {EOS_ID}
    assert grammar.accept_tokens("r", [END])
    assert allowed(grammar) & {letters[0], letters[1], START, END, EOS_ID} == set(letters)
    assert not grammar.accept_tokens("r", [END])


def test_the_first_token_may_open_a_thought(compiled: Any, letters: list[int]) -> None:
    assert START in allowed(grammar_of(compiled, "unopened"))
    assert START not in allowed(grammar_of(compiled, "closed"))
    grammar = grammar_of(compiled, "unopened")
    assert grammar.accept_tokens("r", letters)
    assert START not in allowed(grammar)


def test_a_token_that_ends_the_thought_by_itself_is_the_grammars_first(compiled: Any, letters: list[int]) -> None:
    grammar = grammar_of(compiled, "open", implicit=(letters[1],))
    assert grammar.validate_tokens([7, letters[1], letters[0], 7]) == [7, letters[1], letters[0]]
    assert grammar.accept_tokens("r", [7, letters[1]])
    assert EOS_ID not in allowed(grammar)
    assert not grammar.accept_tokens("r", [7])


def test_a_thought_is_not_ended_by_what_the_grammar_cannot_begin_with(compiled: Any, letters: list[int]) -> None:
    grammar = grammar_of(compiled, "open", implicit=(CALL, letters[1]))
    assert allowed(grammar) & {CALL, letters[1]} == {letters[1]}
    assert grammar.validate_tokens([7, CALL]) == [7]


def test_drafts_are_held_up_to_the_first_that_is_wrong(compiled: Any, letters: list[int]) -> None:
    grammar = grammar_of(compiled, "open")
    assert grammar.validate_tokens([7, EOS_ID, 8]) == [7]
    assert grammar.validate_tokens([7, END, letters[0], 7, 7]) == [7, END, letters[0]]
    assert grammar.validate_tokens([7, END]) == [7, END]
    assert allowed(grammar) == set(range(VOCABULARY)) - {EOS_ID}


@pytest.mark.parametrize("opening", ["open", "unopened"])
@pytest.mark.parametrize("seed", range(20))
def test_going_back_is_as_if_it_had_never_gone_on(
    compiled: Any, letters: list[int], opening: Opening, seed: int
) -> None:
    """As the engine fills the rows of drafts: accept some, go back, accept what was drawn."""
    draw = random.Random(seed)
    grammar, tokens = grammar_of(compiled, opening), []  # type: tuple[ThoughtGrammar, list[int]]
    for _ in range(12):
        drafts: list[int] = []
        for _ in range(draw.randint(1, 4)):
            options = sorted(allowed(grammar) & {*letters, 7, START, END})
            drafts.append(draw.choice(options))
            assert grammar.accept_tokens("r", drafts[-1:])
        kept = draw.randint(0, len(drafts))
        grammar.rollback(len(drafts) - kept)
        tokens += drafts[:kept]
        fresh = grammar_of(compiled, opening)
        assert not tokens or fresh.accept_tokens("r", tokens)
        assert allowed(grammar) == allowed(fresh)
        assert grammar.is_terminated() == fresh.is_terminated()
