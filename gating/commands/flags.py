"""Settings out of a command line and an environment: one flag, and one variable, for each field of a frozen model.

A field's docstring is its help. A bool is a flag without a value, a tuple takes several values, a dict takes JSON, a
whole number may have a suffix (4K); an alias is the flag's name where the field cannot have it. Knows argparse and
pydantic, and no command. Imports no torch, so that `--help` answers at once.
"""

import argparse
import importlib
import re
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.json_text import JsonError, parse_json

Settings = TypeVar("Settings", bound=BaseModel)

_NOTHING: Mapping[str, Any] = {}
_SUFFIXED = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)([kmgtKMGT])i?B?", re.ASCII)
_SHOWN_CHARACTERS = 80


def require(package: str, extra: str) -> None:
    """See to it that a package is there, before hours of work need it.

    Raises:
        CommandError: it is not; names the extra that brings it.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise CommandError(f"{package} is not installed; install ultrafuser[{extra}]") from error


def parse_command(
    model: type[Settings],
    argv: Sequence[str],
    cache: str | None = None,
    *,
    prog: str,
    usage: str,
    description: str,
    positional: str = "",
) -> Settings:
    """Read a command line (without the command's name) into its settings; prints and exits for `--help`.

    `prog`, `usage` and `description` are for the help. `positional` is the one field that is given without a flag; it
    may have a default. `cache` is the default of the field of that name, where there is one.

    Raises:
        CommandError: an unknown flag, or a value that does not fit.
    """
    parser = build_parser(model, prog=prog, usage=usage, description=description, positional=positional)
    return resolve(model, {"cache": cache, **vars(parser.parse_args(argv))})


def build_parser(
    model: type[BaseModel],
    *,
    prog: str,
    usage: str,
    description: str,
    positional: str = "",
    given: Container[str] | None = None,
) -> argparse.ArgumentParser:
    """All flags of a model, as `parse_command` describes them; `given` as in `add_flags`."""
    parser = Parser(prog=prog, usage=f"{prog} {usage}", description=description)
    add_flags(parser, model.model_fields, positional=positional, given=given)
    return parser


class Parser(argparse.ArgumentParser):
    """Raises its complaints as `CommandError`; a flag that was not given leaves no attribute."""

    def __init__(self, **options: Any) -> None:
        formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=110)
        super().__init__(**options, formatter_class=formatter, argument_default=argparse.SUPPRESS, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see `{self.prog} --help`")


def add_flags(
    parser: Parser,
    fields: Mapping[str, FieldInfo],
    title: str = "",
    positional: str = "",
    overrides: bool = False,
    given: Container[str] | None = None,
) -> None:
    """Add a flag for each field, in a section of the help if there is a title; `positional` as in `parse_command`.

    `overrides`: an environment may have said something before. Then a bool can be switched off, too, and a tuple's flag
    takes one value and is repeated.
    `given`: names of what a file has said, which a command line may leave out; a bool can be switched off.
    """
    group = parser.add_argument_group(title) if title else parser
    for name, field in fields.items():
        if name == positional:
            count = None if field.is_required() and name not in (given or ()) else "?"
            parser.add_argument(name, nargs=count, metavar=name.upper(), help=_help(field, overrides))
        else:
            name = field.alias or name
            options = {"dest": name, "help": _help(field, overrides), **_options(name, field, overrides, given)}
            group.add_argument(flag_of(name), **options)


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def resolve(
    model: type[Settings], flags: Mapping[str, Any], environment: Mapping[str, str] = _NOTHING, prefix: str = ""
) -> Settings:
    """Settings from parsed flags, else from the environment, both by name; names that the model lacks are left alone.

    Of the environment all is text, several values with commas between them; `prefix` is that of its variables.

    Raises:
        CommandError: a value does not fit; names the flag or variable it came from.
    """
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    given = {name: value for name, value in {**environment, **flags}.items() if name in fields}
    try:
        return model(**{name: value_of(fields[name], value) for name, value in given.items()})
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, CommandError):
            name, text = str(cause).split(":", 1)
            raise type(cause)(f"{flag_of(name)}:{text}") from error
        name = str(first["loc"][0])
        source = flag_of(name) if name in flags else prefix + name.upper()
        value = given[name] if len(first["loc"]) == 1 else first["input"]
        raise CommandError(f"{source}: {first['msg']}, got {_shown(value)}; {_way_out(fields[name])}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _way_out(field: FieldInfo) -> str:
    """The range of a number that has one."""
    low, high = (_bound(field, name) for name in ("ge", "le"))
    return "change the value" if low is None or high is None else f"give {low} to {high}"


def _bound(field: FieldInfo, name: str) -> Any:
    """A bound that is written at the field, or at its type."""
    metadata = [*field.metadata, *(item for kind in get_args(field.annotation) for item in _constraints(kind))]
    found = (getattr(item, name, None) for item in metadata)
    return next((bound for bound in found if bound is not None), None)


def _constraints(kind: Any) -> list[Any]:
    """Of an annotated type: its annotations, and those in a `Field` among them."""
    own = list(getattr(kind, "__metadata__", ()))
    return own + [item for info in own if isinstance(info, FieldInfo) for item in info.metadata]


def _help(field: FieldInfo, overrides: bool) -> str:
    text = " ".join((field.description or "").split())
    is_off = field.default is False and not overrides
    if not ("default:" in text.lower() or field.is_required() or is_off or field.default in (None, (), "")):
        text = f"{text.rstrip('.')} (default: {field.default})."
    return text.replace("%", "%%")


def _options(name: str, field: FieldInfo, overrides: bool, given: Container[str] | None) -> dict[str, Any]:
    kind = kind_of(field)
    if kind is bool:
        return {"action": "store_true" if given is None and not overrides else argparse.BooleanOptionalAction}
    options = {"required": field.is_required() and name not in (given or ()), "metavar": name.split("_")[-1].upper()}
    if get_origin(kind) is tuple:
        return options | ({"action": "append"} if overrides else {"action": "extend", "nargs": "+"})
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if isinstance(choices[0], int):  # argparse makes a number of the text, pydantic would not
            return {"type": int, "choices": choices}
        return options | {"metavar": "{" + ",".join(choices) + "}"}
    return options | {"metavar": {int: "N", float: "X"}.get(kind, options["metavar"])}


def value_of(field: FieldInfo, text: Any) -> Any:
    """What a text stands for, where the model itself would not read it: numbers with a suffix, JSON, several values."""
    kind = kind_of(field)
    if not isinstance(text, str):
        return text
    if kind is int and (match := _SUFFIXED.fullmatch(text)):
        number, unit = match.groups()
        power = "kmgt".index(unit.lower()) + 1
        return int(Fraction(number) * (1000 if unit.islower() else 1024) ** power)
    if get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(","))
    if get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        with suppress(JsonError):  # the model says that it is none
            return parse_json(text)
    return text


def kind_of(field: FieldInfo) -> Any:
    """The type of a field's values, without `| None` and constraints."""
    kinds = get_args(field.annotation)
    kind = kinds[0] if type(None) in kinds else field.annotation
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind
