"""Grammars with a part that no text fulfils: a class without characters, or a rule that never comes to an end.

The library compiles them. A response that gets into such a part has no token to go on with, or never ends.
"""

import json
import sys
from typing import Any

from ultrafuser.server.grammar.characters import ALL, NONE, Characters, either, of, without
from ultrafuser.server.grammar.errors import ConstraintError

# Kinds of expressions in the library's serialized grammar; what is not named here comes to an end by itself.
_CLASS, _RULE, _SEQUENCE, _CHOICES, _REPEAT = 1, 4, 5, 6, 8


def refuse_endless(grammar: Any) -> None:
    """Look at every rule of one of the library's grammars.

    Raises:
        ConstraintError: naming the rule.
    """
    rules = _Rules(json.loads(grammar.serialize_json()))
    for name, is_fulfillable in rules.found.items():
        if not is_fulfillable:
            raise ConstraintError(f"a part of it ({name!r}) cannot be fulfilled by any text that comes to an end")


class _Rules:
    def __init__(self, grammar: dict[str, Any]) -> None:
        self._data, self._starts = grammar["grammar_expr_data"], grammar["grammar_expr_indptr"]
        self._ends: list[bool] = [False] * len(grammar["rules"])
        bodies = [rule[1] for rule in grammar["rules"]]
        has_changed = True
        while has_changed:
            now = [own or self._is_fulfillable(body) for own, body in zip(self._ends, bodies, strict=True)]
            has_changed, self._ends = now != self._ends, now
        self.found = {rule[0]: own for rule, own in zip(grammar["rules"], self._ends, strict=True)}
        for rule, body, own in zip(grammar["rules"], bodies, self._ends, strict=True):
            self.found[rule[0]] = own and self._is_whole(body)

    def _expression(self, number: int) -> tuple[int, list[int]]:
        start = self._starts[number]
        return self._data[start], self._data[start + 2 : start + 2 + self._data[start + 1]]

    def _is_fulfillable(self, number: int) -> bool:
        kind, data = self._expression(number)
        if kind == _CLASS:
            return _characters(data) != NONE
        if kind == _RULE:
            return self._ends[data[0]]
        if kind == _REPEAT:
            return data[1] == 0 or self._ends[data[0]]
        if kind == _SEQUENCE:
            return all(self._is_fulfillable(child) for child in data)
        if kind == _CHOICES:
            return any(self._is_fulfillable(child) for child in data)
        return True

    def _is_whole(self, number: int) -> bool:
        """Whether every choice in it can be fulfilled, too."""
        kind, data = self._expression(number)
        return kind != _CHOICES or all(self._is_fulfillable(child) for child in data)


def _characters(data: list[int]) -> Characters:
    named = either([of((low, min(high, sys.maxunicode))) for low, high in zip(data[1::2], data[2::2], strict=True)])
    return without(ALL, named) if data[0] else named
