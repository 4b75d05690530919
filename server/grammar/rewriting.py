"""JSON Schemas rewritten: equal to what was sent or narrower, made of what the grammar library keeps, or refused.

The library ignores what it does not know, says so in no error, and keeps some keywords only by themselves. So a schema
is read here for what it means (`normal_form.py`) and written anew (`emission.py`). docs/api.md has the table of
keywords.
"""

from typing import Any

from ultrafuser.server.grammar.document import Document
from ultrafuser.server.grammar.emission import Writer
from ultrafuser.server.grammar.errors import ConstraintError
from ultrafuser.server.grammar.normal_form import NormalForm


def kept_schema(schema: Any, name: str = "s") -> dict[str, Any]:
    """A schema that the library keeps, and that allows nothing which `schema` forbids.

    Its references lead into its own `$defs`, whose names begin with `name`.

    Raises:
        ConstraintError: a keyword cannot be kept or has a wrong value, named by its place; or nothing fulfils the
            schema.
    """
    if not isinstance(schema, dict | bool):
        raise ConstraintError("a schema must be an object, true or false")
    try:
        document = Document(schema)
        return Writer(NormalForm(document), name).root("")
    except RecursionError:
        raise ConstraintError("its references and groups nest too deeply") from None
