"""Command lines laid out from settings: one flag for each field of a frozen model, with the field's text as its help.

Knows argparse and pydantic, and no command. Imports no torch, so that `--help` answers at once.
"""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from gating.errors import CommandError

Settings = TypeVar("Settings", bound=BaseModel)


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
    *,
    prog: str,
    usage: str,
    description: str,
    positional: str,
    defaults: Mapping[str, Any],
) -> Settings:
    """Read a command line into its settings; prints and exits for `--help`.

    Args:
        model: frozen, with a docstring under each field. A bool is a flag, `tuple[str, ...]` takes several values; an
            alias is the flag's name where the field cannot have it.
        argv: without the command's name.
        prog: the command, for messages.
        usage: its first line of help.
        description: its second.
        positional: the one field that is given without a flag; it may have a default.
        defaults: replace the model's own.

    Raises:
        CommandError: an unknown flag, or a value that does not fit.
    """
    parser = build_parser(model, prog=prog, usage=usage, description=description, positional=positional)
    given = vars(parser.parse_args(argv))
    try:
        return model(**{**defaults, **given})
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, CommandError):
            name, text = str(cause).split(":", 1)
            raise type(cause)(f"--{name.replace('_', '-')}:{text}") from error
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise CommandError(f"{flag}: {first['msg']}, got {first['input']!r}; change the value") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see `{self.prog} --help`")


def build_parser(
    model: type[BaseModel], *, prog: str, usage: str, description: str, positional: str
) -> argparse.ArgumentParser:
    """All flags, as `parse_command` describes them; one that was not given leaves no attribute."""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {usage}",
        description=description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name, field in model.model_fields.items():
        help_text = str(field.description).replace("%", "%%")
        if name == positional:
            count = None if field.is_required() else "?"
            parser.add_argument(name, nargs=count, metavar=name.upper(), help=help_text)
            continue
        name = field.alias or name
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=help_text, **_options(name, field))
    return parser


def _options(name: str, field: Any) -> dict[str, Any]:
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    metavar = name.split("_")[-1].upper()
    if field.annotation is bool:
        return {"action": "store_true"}
    if field.annotation == tuple[str, ...]:
        # Each time it is named it adds to what was there: `--data a b` and `--data a --data b` are the same.
        return {"nargs": "+", "action": "extend", "required": field.is_required(), "metavar": metavar}
    literal = field.annotation if get_origin(field.annotation) is Literal else next(iter(kinds), None)
    if get_origin(literal) is Literal:
        choices = get_args(literal)
        return {"type": type(choices[0]), "choices": choices}
    return {"required": field.is_required(), "metavar": metavar}
