"""A constraint of any kind, compiled: the same code tries it out and serves it."""

import json
from typing import Any

import xgrammar

from ultrafuser.server.grammar.characters import ALL, single
from ultrafuser.server.grammar.endless import refuse_endless
from ultrafuser.server.grammar.errors import ConstraintError
from ultrafuser.server.grammar.expression_parser import parse_whole
from ultrafuser.server.grammar.expressions import NOTHING, OneOf, choice, library_text, restricted, sequence
from ultrafuser.server.grammar.rewriting import kept_schema
from ultrafuser.server.grammar.tags import kept_tag

BOUNDED_WHITESPACE = 2
"""Most characters of white space between two tokens of JSON, unless the operator says otherwise: a small model may
write blank lines for ever."""


def compiled(compiler: Any, kind: str, text: str, max_whitespace: int | None) -> Any:
    """One of the library's compiled grammars.

    `kind` is JSON (a schema), JSON_OBJECT, REGEX, CHOICE (a list of strings as JSON), GRAMMAR (in EBNF), LARK or
    STRUCTURAL_TAG. `max_whitespace` is how many characters of white space may stand between tokens of JSON; None: any
    number.

    Raises:
        ConstraintError: the constraint cannot be compiled, kept or fulfilled, for whatever reason.
        MemoryError: it needs too much.
    """
    try:
        return compiler.compile_grammar(checked_grammar(kind, text, max_whitespace))
    except (ConstraintError, MemoryError):
        raise
    except Exception as error:
        raise _translated(error) from error


def checked_grammar(kind: str, text: str, max_whitespace: int | None) -> Any:
    """One of the library's grammars, not compiled for a vocabulary; raises as `compiled`."""
    try:
        grammar = _grammar(kind, text, max_whitespace)
        refuse_endless(grammar)
    except (ConstraintError, MemoryError):
        raise
    except Exception as error:
        raise _translated(error) from error
    return grammar


def _grammar(kind: str, text: str, max_whitespace: int | None) -> Any:
    match kind:
        case "JSON":
            return _json(kept_schema(_loaded(text)), max_whitespace)
        case "JSON_OBJECT":
            return _json({"type": "object"}, max_whitespace)
        case "REGEX":
            return xgrammar.Grammar.from_regex(kept_expression(text))
        case "CHOICE":
            return xgrammar.Grammar.from_regex(_choices(_loaded(text)))
        case "LARK":
            return xgrammar.Grammar.from_lark(text)
        case "STRUCTURAL_TAG":
            return xgrammar.Grammar.from_structural_tag(kept_tag(_loaded(text), max_whitespace, kept_expression))
    assert kind == "GRAMMAR", kind
    return xgrammar.Grammar.from_ebnf(text)


def kept_expression(text: str) -> str:
    """A regular expression for the whole response, as the library keeps it.

    Raises:
        ConstraintError: it cannot be kept, or matches nothing.
    """
    tree = parse_whole(text)
    if tree == NOTHING:
        raise ConstraintError("nothing matches it")
    return library_text(tree)


def _json(schema: Any, max_whitespace: int | None) -> Any:
    if max_whitespace == 0:
        form: dict[str, Any] = {"any_whitespace": False, "separators": (",", ":")}
    else:
        form = {"any_whitespace": True, "max_whitespace_cnt": max_whitespace}
    return xgrammar.Grammar.from_json_schema(json.dumps(schema), **form)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConstraintError(f"it is not JSON: {error}") from None


def _choices(choices: Any) -> str:
    if not isinstance(choices, list) or not choices:
        raise ConstraintError("there must be at least one choice")
    trees = [sequence([restricted(OneOf(single(character)), ALL) for character in str(own)]) for own in choices]
    if NOTHING in trees:
        raise ConstraintError(f"{choices[trees.index(NOTHING)]!r} has half of a surrogate pair, which is no character")
    return library_text(choice(trees))


def _translated(error: Exception) -> Exception:
    """The library's words without the place in its source."""
    if "bad_alloc" in str(error):
        return MemoryError()
    words = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ConstraintError(words.partition(": ")[2].strip() or words)
