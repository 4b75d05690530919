"""A domain: what instructions are about, how many of them, and what is asked of texts. One YAML file, no code.

Shipped ones are found by name. Knows no prompts and no calls.
"""

import hashlib
import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from ultrafuser.gating.commands.fields import Count
from ultrafuser.gating.data.conversations import check_domain
from ultrafuser.gating.errors import DataError, DomainError
from ultrafuser.gating.synthesis.stages.records import Frozen
from ultrafuser.gating.yaml_text import YamlError, parse_yaml

_FOLDER = Path(__file__).parents[1] / "domains"
Text = Annotated[str, Field(min_length=1)]


class Limits(Frozen):
    """Lengths in characters, which every text is held to and the model is told."""

    topic: Count = 80
    """Most of a topic's name."""

    note: Count = 240
    """Most of a sub-topic's note."""

    instruction_min: Count = 12
    """Least of an instruction."""

    instruction: Count = 3000
    """Most of an instruction."""

    response_min: Count = 1
    """Least of a response."""

    response: Count = 20_000
    """Most of a response."""


class Expected(Frozen):
    """Mean tokens, for the estimate of a run that has made nothing yet."""

    instruction: Count
    """Of an instruction."""

    response: Count
    """Of a response."""


class Domain(Frozen):
    """One domain."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
    """The `domain` of its rows, and part of every id."""

    description: Text
    """What belongs to it, as the model that makes it is told."""

    meta_topics: Count
    """How many."""

    sub_topics: Count
    """Of each meta-topic."""

    instructions: Count
    """Of each sub-topic, before related ones are made of each."""

    angles: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Ways to ask; calls for the same sub-topic get different ones, so that they differ."""

    guidance: Text
    """System message for responses; it is not part of the rows."""

    language: Annotated[str, Field(pattern=r"^[a-z]{2,3}$")] | None = "en"
    """ISO 639-1 code of the language of all texts; null: any."""

    limits: Limits = Limits()
    """Lengths."""

    expected: Expected
    """Mean tokens."""


def domain_names() -> tuple[str, ...]:
    """Names of the shipped domains."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def load_domain(name_or_path: str) -> Domain:
    """A shipped domain, or one of a file.

    Raises:
        DomainError: there is none, or a key does not fit.
    """
    path = (
        _FOLDER / f"{name_or_path}.yaml" if name_or_path in domain_names() else Path(os.path.expanduser(name_or_path))
    )
    if not os.path.isfile(path):
        raise DomainError(f"{name_or_path}: no such domain; give a YAML file, or one of {', '.join(domain_names())}")
    try:
        domain = Domain.model_validate(parse_yaml(path.read_bytes()))
        check_domain(domain.name)
        return domain
    except YamlError as error:
        raise DomainError(f"{name_or_path}: not YAML ({error}); correct the file") from error
    except OSError as error:
        raise DomainError(f"{name_or_path}: cannot be read ({error.strerror}); name another file") from error
    except DataError as error:
        raise DomainError(f"{name_or_path}: {str(error).replace('domain', 'name', 1)}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "file"
        raise DomainError(f"{name_or_path}: {key}: {first['msg']}; correct the file") from error


def digest(domain: Domain) -> str:
    """What tells two versions of a domain apart."""
    return hashlib.sha256(domain.model_dump_json().encode()).hexdigest()[:16]
