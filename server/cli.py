"""The command line of `ultrafuser`: flags out of the settings' models, help, and what to say to a wrong flag.

The settings know their names, types and texts; this module only lays them out. It imports neither vLLM nor torch, so
that `--help` answers at once. Does not start anything.
"""

import argparse
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gating.model.engine_options import REFUSED_OPTIONS, EngineOptions
from gating.model.schema import EngineSettings
from server import __version__
from server.settings import PREFIX, SECTIONS, ServerSettings, SettingsError, read_environment, resolve_settings

_SUFFIXED = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT])i?B?")


@dataclass(frozen=True)
class OfflineCommand:
    """A command that runs without the server."""

    module: str
    """Its `run(argv, cache)` is the command."""

    summary: str
    """Its line in the list of commands."""

    way_on: str
    """What to do after it was interrupted."""


OFFLINE_COMMANDS: Mapping[str, OfflineCommand] = {
    "train": OfflineCommand(
        "gating.training.command", "train a gate, specialists, or both", "the same command with --resume goes on"
    ),
    "eval": OfflineCommand(
        "gating.evaluation.command", "evaluate a fused model", "the same command goes on from what is in the cache"
    ),
    "data": OfflineCommand(
        "gating.synthesis.command",
        "make instruction data for new domains",
        "the same command goes on from what is there",
    ),
    "analyze": OfflineCommand(
        "gating.analysis.command",
        "show what a gate does, and training curves",
        "the same command uses what is in the cache",
    ),
}


@dataclass(frozen=True)
class ServeCommand:
    """What `ultrafuser serve` was asked to do."""

    settings: ServerSettings
    """The server's settings."""

    engine_options: Mapping[str, Any]
    """The engine options that were given; they override the fusion file's."""


def parse_command(argv: Sequence[str], environ: Mapping[str, str]) -> ServeCommand:
    """Read the command line and the environment; prints and exits for `--help` and `--version`.

    Raises:
        SettingsError: an unknown flag or variable, or a value that does not fit.
    """
    arguments, rest = build_parser().parse_known_args([_dashed(argument) for argument in argv])
    flags = vars(arguments)
    if rest:
        _refuse(rest[0])
    environment = read_environment(environ, [*ServerSettings.model_fields, *EngineOptions.model_fields])
    return ServeCommand(resolve_settings(flags, environment), _engine_options(flags, environment))


def build_parser() -> argparse.ArgumentParser:
    """The parser with all flags, grouped; a flag that was not given leaves no attribute."""
    parser = _Parser("ultrafuser", "Serve several specialised language models as one, fused token by token.")
    parser.add_argument("--version", action="version", version=f"ultrafuser {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_ServeParser)
    serve = commands.add_parser("serve", help="serve a fused model behind the OpenAI API")
    for name, command in OFFLINE_COMMANDS.items():
        commands.add_parser(name, help=f"{command.summary} (`ultrafuser {name} --help`)")
    fusion = ServerSettings.model_fields["fusion"]
    serve.add_argument("fusion", nargs="?", metavar="FUSION", default=argparse.SUPPRESS, help=_help(fusion))
    for section in SECTIONS:
        _add_group(serve, str(section.__doc__), section.model_fields)
    own = {name: field for name, field in EngineOptions.model_fields.items() if name not in EngineSettings.model_fields}
    _add_group(serve, "The engine (each overrides the fusion file's `engine` section)", EngineSettings.model_fields)
    _add_group(serve, "The engine's requests and metrics", own)
    return parser


class _Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
        )

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see `{self.prog} --help`")


class _ServeParser(_Parser):
    def __init__(self, prog: str, **_: Any) -> None:
        description = (
            "Serve a fused model behind the OpenAI API.\n\nexamples:\n"
            "  ultrafuser serve                          the demo, on http://127.0.0.1:8000/v1\n"
            "  ultrafuser serve my.yaml --port 9000      your own fusion file\n"
            "  ultrafuser serve demo --max-num-seqs 16 --kv-cache-memory-bytes 4G"
        )
        epilog = (
            f"Every option can also be set by environment: {PREFIX} and its name, e.g. {PREFIX}PORT=9000,\n"
            f"{PREFIX}FUSION=my.yaml, {PREFIX}MAX_MODEL_LEN=4K. The command line wins over the environment.\n"
            "Numbers take k, m, g (thousands) and K, M, G (powers of 1024)."
        )
        super().__init__(prog, description, epilog)
        self.usage = "ultrafuser serve [FUSION] [options]"


def _add_group(parser: argparse.ArgumentParser, title: str, fields: Mapping[str, FieldInfo]) -> None:
    group = parser.add_argument_group(title)
    for name, field in fields.items():
        if name == "fusion":
            continue
        plain = _plain_type(field)
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(field)}
        if plain is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(plain) is tuple:
            options |= {"action": "append", "metavar": name.split("_")[-1].upper()}
        else:
            options["metavar"] = _metavar(name, plain)
        group.add_argument(f"--{name.replace('_', '-')}", **options)


def _plain_type(field: FieldInfo) -> Any:
    """The type of a field's values, without `| None`."""
    arguments = [part for part in get_args(field.annotation) if part is not type(None)]
    plain = arguments[0] if type(None) in get_args(field.annotation) else field.annotation
    return get_args(plain)[0] if get_origin(plain) is Annotated else plain


def _metavar(name: str, plain: Any) -> str:
    if get_origin(plain) is Literal:
        return "{" + ",".join(get_args(plain)) + "}"
    return {int: "N", float: "X"}.get(plain, name.split("_")[-1].upper())


def _help(field: FieldInfo) -> str:
    text = " ".join(str(field.description).split()).replace("null ", "unset, it ").replace("%", "%%")
    is_told = "default:" in text or field.default in (None, (), "")
    return text if is_told else f"{text.rstrip('.')} (default: {field.default})."


def _dashed(argument: str) -> str:
    """`--max_model_len=4K` as `--max-model-len=4K`: vLLM takes both spellings, and so do we."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _engine_options(flags: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    fields = EngineOptions.model_fields
    given = {name: value for source in (environment, flags) for name, value in source.items() if name in fields}
    values = {name: _value(_plain_type(fields[name]), value) for name, value in given.items()}
    try:
        return EngineOptions.model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        source = f"--{name.replace('_', '-')}" if name in flags else PREFIX + name.upper()
        raise SettingsError(f"{source}: {first['msg']}, got {given[name]!r}; change the value") from error


def _value(plain: Any, value: Any) -> Any:
    """A number with its suffix worked out, JSON as the object it describes; all else is left to the model."""
    if plain is int and isinstance(value, str) and (match := _SUFFIXED.fullmatch(value)):
        number, unit = match.groups()
        power = "kmgt".index(unit.lower()) + 1
        return int(float(number) * (1000 if unit.islower() else 1024) ** power)
    if get_origin(plain) is dict and isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _refuse(argument: str) -> NoReturn:
    """Say what is wrong with an argument that no flag took."""
    flag = argument.partition("=")[0]
    if not flag.startswith("--"):
        raise SettingsError(f"{argument}: unexpected argument; name one fusion file, see `ultrafuser serve --help`")
    name = flag.removeprefix("--").replace("-", "_")
    names = [*ServerSettings.model_fields, *EngineOptions.model_fields]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if near and name not in REFUSED_OPTIONS:
        raise SettingsError(f"{flag}: there is no such option; did you mean --{near[0].replace('_', '-')}?")
    reason = REFUSED_OPTIONS.get(name) or _refusal(name)
    # Where a reason names another option, its flag is meant here.
    raise SettingsError(f"{flag}: " + re.sub(r"\w+_\w+", lambda option: f"--{option[0].replace('_', '-')}", reason))


def _refusal(name: str) -> str:
    """Only on the way out are the seconds well spent that importing vLLM takes."""
    from server.engine.shared.options import refusal

    return refusal(name)
