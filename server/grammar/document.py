"""A schema as it was sent: its subschemas by their place, and where its references lead."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from ultrafuser.server.grammar.errors import at

Schema = dict[str, Any] | bool

MAX_NESTING = 64
"""How deep objects and arrays of a schema may nest."""

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLES = (
    *("additionalProperties", "unevaluatedProperties", "propertyNames", "items", "additionalItems"),
    *("unevaluatedItems", "contains", "not", "if", "then", "else"),
)


class Document:
    """Every subschema has a place, a JSON pointer from the root; resources with an `$id` of their own are embedded."""

    def __init__(self, root: Any) -> None:
        """Find the subschemas of a value of JSON.

        Raises:
            ConstraintError: it nests too deeply, or an identifier is no string.
        """
        _refuse_deep(root)
        self._root = root
        self._schemas: dict[str, Any] = {}
        self._resources: dict[str, str] = {}
        self._uris: dict[str, str] = {"": ""}
        self._bases: dict[str, str] = {"": ""}
        self._anchors: dict[tuple[str, str], str] = {}
        self._collect("", root, "", "")

    def schema(self, place: str) -> Schema:
        """The subschema at a place.

        Raises:
            ConstraintError: what is there is no schema.
        """
        found = self._schemas[place]
        if not isinstance(found, dict | bool):
            raise at(place, "a schema must be an object, true or false")
        return found

    def add(self, place: str, schema: Schema) -> str:
        """Put a schema of our own beside those that were sent."""
        self._schemas[place] = schema
        return place

    def target(self, place: str, reference: Any) -> str:
        """The place that a `$ref` at a place leads to.

        Raises:
            ConstraintError: it leads nowhere, or out of the document.
        """
        where = f"{place}/$ref"
        if not isinstance(reference, str):
            raise at(where, "must be a string")
        resource = self._resources[place]
        uri, fragment = urldefrag(reference)
        if uri:
            found = self._uris.get(urljoin(self._bases[resource], uri))
            if found is None:
                raise at(where, f"{reference!r} leads out of the schema; put what it names into $defs")
            resource = found
        if fragment and not fragment.startswith("/"):
            anchor = self._anchors.get((resource, fragment))
            if anchor is None:
                raise at(where, f"there is no $anchor {fragment!r}")
            return anchor
        return self._pointed(where, resource, unquote(fragment))

    def _pointed(self, where: str, resource: str, fragment: str) -> str:
        value, place = self._value(resource), resource
        for step in fragment.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif isinstance(value, list) and key.isascii() and key.isdigit() and int(key) < len(value):
                value = value[int(key)]
            else:
                raise at(where, f"there is nothing at {fragment!r}")
            place += f"/{step}"
        if place not in self._schemas:
            self._collect(place, value, resource, self._bases[resource])
        return place

    def _value(self, place: str) -> Any:
        value = self._root
        for step in place.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            value = value[int(key)] if isinstance(value, list) else value[key]
        return value

    def _collect(self, place: str, schema: Any, resource: str, uri: str) -> None:
        self._schemas[place] = schema
        if isinstance(schema, dict):
            if "$id" in schema:
                resource, uri = place, urljoin(uri, _string(place, schema, "$id"))
                self._uris[urldefrag(uri)[0]], self._bases[place] = place, uri
            for name in ("$anchor", "$dynamicAnchor"):
                if name in schema:
                    self._anchors[resource, _string(place, schema, name)] = place
            for key, child in _children(schema):
                self._collect(f"{place}/{key}", child, resource, uri)
        self._resources[place] = resource


def step(key: str | int) -> str:
    """A key as a step of a JSON pointer."""
    return str(key).replace("~", "~0").replace("/", "~1")


def _children(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in _MAPS:
        if isinstance(schema.get(name), dict):
            yield from ((f"{name}/{step(key)}", child) for key, child in schema[name].items())
    for name in _LISTS:
        if isinstance(schema.get(name), list):
            yield from ((f"{name}/{number}", child) for number, child in enumerate(schema[name]))
    for name in _SINGLES:
        if isinstance(schema.get(name), dict | bool):
            yield name, schema[name]


def _string(place: str, schema: dict[str, Any], name: str) -> str:
    if not isinstance(schema[name], str):
        raise at(f"{place}/{name}", "must be a string")
    return str(schema[name])


def _refuse_deep(root: Any) -> None:
    level = [root]
    for _ in range(MAX_NESTING + 1):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    if any(isinstance(value, dict | list) for value in level):
        raise at("", f"objects and arrays nest more than {MAX_NESTING} deep")


def canonical(value: Any) -> str:
    """A text that is the same for values which JSON Schema takes for equal: 1 and 1.0, objects in any order."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_plain(own) for own in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
