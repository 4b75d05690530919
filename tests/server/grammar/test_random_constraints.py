"""Constraints drawn at random are kept or refused, and a text that follows a kept one is never forbidden."""

import json
import re
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings

from tests.server.grammar.schemas import EXPRESSIONS, schemas
from tests.server.grammar.walks import COMPILER, compiled_schema, drawn
from ultrafuser.server.grammar.compiling import compiled
from ultrafuser.server.grammar.errors import ConstraintError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Possible:FutureWarning"),  # Python's, of a class like [[a]
    # Hypothesis's, if another thread of the process happens to draw a number while an example is made.
    pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies"),
]

SAME_EVERY_TIME = settings(
    derandomize=True, database=None, deadline=None, max_examples=200, suppress_health_check=list(HealthCheck)
)


@SAME_EVERY_TIME
@given(schemas())
def test_no_text_that_follows_a_kept_schema_is_forbidden_by_it(schema: Any) -> None:
    try:
        grammar = compiled_schema(schema)
    except ConstraintError:
        return
    validator = jsonschema.Draft202012Validator(schema)
    for seed in range(4):
        text = drawn(grammar, seed)
        if text is not None:
            validator.validate(json.loads(text))


@SAME_EVERY_TIME
@given(EXPRESSIONS)
def test_every_text_that_follows_a_kept_regex_is_matched_by_it(expression: str) -> None:
    try:
        grammar = compiled(COMPILER, "REGEX", expression, None)
    except ConstraintError:
        return
    for seed in range(4):
        text = drawn(grammar, seed)
        if text is not None:
            assert re.search(expression, text), text
