"""Structural tags: the schemas and expressions in them rewritten, white space in their JSON bounded."""

import json
from collections.abc import Callable
from typing import Any

from ultrafuser.server.grammar.document import step
from ultrafuser.server.grammar.errors import ConstraintError
from ultrafuser.server.grammar.rewriting import kept_schema


def kept_tag(tag: Any, max_whitespace: int | None, kept_expression: Callable[[str], str]) -> str:
    """The tag's text as the library takes it; the older form with `structures` becomes the newer one.

    Raises:
        ConstraintError: naming the place of a schema or expression that cannot be kept.
    """
    if not isinstance(tag, dict):
        raise ConstraintError("a structural tag must be an object")
    if "structures" in tag:
        tag = _newer(tag)
    return json.dumps(_kept(tag, "", max_whitespace, kept_expression))


def _kept(value: Any, place: str, max_whitespace: int | None, kept_expression: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_kept(own, f"{place}/{number}", max_whitespace, kept_expression) for number, own in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if kind == "json_schema" and "json_schema" in value:
        schema = _named(f"{place}/json_schema", kept_schema, value["json_schema"])
        own = value.get("max_whitespace_cnt")
        # A tag has no form without any: one character is the least that the library can be told.
        bound = own if own is not None or max_whitespace is None else max(max_whitespace, 1)
        return value | {"json_schema": schema, "max_whitespace_cnt": bound}
    if kind == "regex" and isinstance(value.get("pattern"), str):
        return value | {"pattern": _named(f"{place}/pattern", kept_expression, value["pattern"])}
    return {key: _kept(own, f"{place}/{step(key)}", max_whitespace, kept_expression) for key, own in value.items()}


def _named(place: str, keep: Callable[[Any], Any], value: Any) -> Any:
    try:
        return keep(value)
    except ConstraintError as error:
        raise ConstraintError(f"{place}: {error}") from None


def _newer(tag: dict[str, Any]) -> dict[str, Any]:
    try:
        tags = [
            {
                "type": "tag",
                "begin": own["begin"],
                "content": {"type": "json_schema", "json_schema": own["schema"]},
                "end": own["end"],
            }
            for own in tag["structures"]
        ]
        triggers = tag["triggers"]
    except (KeyError, TypeError) as error:
        raise ConstraintError(f"structures and triggers are not of the form of a structural tag: {error}") from None
    return {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": triggers, "tags": tags}}
