"""Objects in the form that the grammar library keeps: declared properties in their order, then free ones.

A free name is written without escapes where some name must not be written, so that it cannot be spelt in another way.
"""

from collections.abc import Callable
from typing import Any

from ultrafuser.server.grammar.alternatives import ANY, Object, Places, Text, Values
from ultrafuser.server.grammar.characters import JSON_CHARACTERS
from ultrafuser.server.grammar.errors import at
from ultrafuser.server.grammar.expression_parser import parse_search
from ultrafuser.server.grammar.expressions import NOTHING, Expression, choice, library_text, matches, restricted
from ultrafuser.server.grammar.normal_form import NormalForm
from ultrafuser.server.grammar.texts import other_than, text_expression


class ObjectWriter:
    """Writes alternatives that are objects."""

    def __init__(
        self, normal_form: NormalForm, is_possible: Callable[[Places], bool], child: Callable[[Places], Any]
    ) -> None:
        """`child` writes a schema."""
        self._normal_form, self._is_possible, self._child = normal_form, is_possible, child

    def schema(self, own: Object) -> dict[str, Any]:
        """The object's schema.

        Raises:
            ConstraintError: a keyword cannot be kept.
        """
        names = list(dict.fromkeys([*own.properties, *self._enumerated(own), *own.required]))
        for name in names:
            _refuse_surrogates(own.place, name)
        declared = {name: own.child(name) for name in names if self._may_be(own, name)}
        impossible = next((name for name in own.required if name not in declared), None)
        if impossible is not None:
            raise at(own.place, f"nothing fulfils it: the property {impossible!r} is required and not allowed")
        names_free, values = self._free(own, names)
        if values is not None and own.low > len(own.required) + 1:
            # A free name may be written twice, and is one property.
            if len(declared) < own.low:
                raise at(
                    f"{own.place}/minProperties",
                    "can be kept for declared properties only, above what is required plus 1",
                )
            values = None
        schema: dict[str, Any] = {"type": "object"}
        if declared:
            schema["properties"] = {name: self._child(places) for name, places in declared.items()}
        if own.required:
            schema["required"] = list(own.required)
        if values is not None and names_free is not None:
            schema["patternProperties"] = {f"^{library_text(names_free)}$": self._child(values)}
        schema["additionalProperties"] = self._child(values) if values is not None and names_free is None else False
        return schema | self._counts(own, len(declared) if values is None else None)

    def _counts(self, own: Object, most: int | None) -> dict[str, int]:
        if most is not None and most < own.low:
            raise at(own.place, "nothing fulfils it: fewer properties are allowed than minProperties demands")
        low = own.low if own.low > len(own.required) else 0
        return ({"minProperties": low} if low else {}) | ({} if own.high is None else {"maxProperties": own.high})

    def _may_be(self, own: Object, name: str) -> bool:
        return self._is_possible(own.child(name)) and self._normal_form.fulfils(own.names, name)

    def _enumerated(self, own: Object) -> list[str]:
        """Names that `propertyNames` lists."""
        alternatives = self._normal_form.of(own.names) if own.names else []
        listed = [value for one in alternatives if isinstance(one, Values) for value in one.values.values()]
        return [name for name in listed if isinstance(name, str)]

    def _free(self, own: Object, names: list[str]) -> tuple[Expression | None, Places | None]:
        """Of undeclared properties the names (None: any) and what their values follow (None: there are none)."""
        tree: Expression | None
        if own.patterns:
            tree, values = self._by_pattern(own)
        elif own.additional is None and own.is_described and own.names == ANY:
            return None, None  # as everybody means it: no more than is described
        else:
            tree, values = self._described_names(own), own.additional or ANY
        if not self._is_possible(values) or tree == NOTHING:
            return None, None
        if tree is None:
            return (other_than(names), values) if names else (None, values)
        # One of those could be written a second time, with another value.
        return (None, None) if any(matches(tree, name) for name in names) else (tree, values)

    def _described_names(self, own: Object) -> Expression | None:
        """The names that `propertyNames` allows without listing them; None: any."""
        if own.names == ANY:
            return None
        trees = [text_expression(one) for one in self._normal_form.of(own.names) if isinstance(one, Text)]
        return None if None in trees else choice([tree for tree in trees if tree is not None])

    def _by_pattern(self, own: Object) -> tuple[Expression, Places]:
        places = set(own.patterns.values())
        if len(places) > 1:
            raise at(f"{own.place}/patternProperties", "more than one pattern cannot be kept")
        if own.names:
            raise at(f"{own.place}/patternProperties", "cannot be kept beside propertyNames")
        trees = [restricted(parse_search(pattern), JSON_CHARACTERS) for pattern in own.patterns]
        return choice(trees), places.pop()


def _refuse_surrogates(place: str, name: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise at(place, "half of a surrogate pair is no character of a property's name")
