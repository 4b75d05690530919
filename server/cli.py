"""The command line of `ultrafuser`: flags out of the settings' models, help, and what to say to a wrong flag.

The settings know their names, types and texts; this module only lays them out. It imports neither vLLM nor torch, so
that `--help` answers at once. Does not start anything.
"""

import argparse
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from ultrafuser import __version__
from ultrafuser.gating.commands.flags import Parser, add_flags, flag_of, resolve
from ultrafuser.gating.model.schema import EngineSettings
from ultrafuser.server.engine_options import REFUSED_OPTIONS, EngineOptions
from ultrafuser.server.settings import (
    PREFIX,
    SECTIONS,
    ServerSettings,
    SettingsError,
    read_environment,
    resolve_settings,
)

_DESCRIPTION = """\
Serve a fused model behind the OpenAI API.

examples:
  ultrafuser serve                          the demo, on http://127.0.0.1:8000/v1
  ultrafuser serve my.yaml --port 9000      your own fusion file
  ultrafuser serve demo --max-num-seqs 16 --kv-cache-memory-bytes 4G"""
_EPILOG = f"""\
Every option can also be set by environment: {PREFIX} and its name, e.g. {PREFIX}PORT=9000,
{PREFIX}FUSION=my.yaml, {PREFIX}MAX_MODEL_LEN=4K. The command line wins over the environment.
Numbers take k, m, g (thousands) and K, M, G (powers of 1024)."""

OPTION_NAMES = frozenset(ServerSettings.model_fields) | frozenset(EngineOptions.model_fields)
"""Of everything that a flag or a variable may set."""


@dataclass(frozen=True)
class OfflineCommand:
    """A command beside `ultrafuser serve`."""

    module: str
    """Its `run(argv, cache)` is the command."""

    summary: str
    """Its line in the list of commands."""

    way_on: str
    """What to do after it was interrupted."""


OFFLINE_COMMANDS: Mapping[str, OfflineCommand] = {
    "train": OfflineCommand(
        "ultrafuser.gating.training.command",
        "train a gate, specialists, or both",
        "the same command with --resume goes on",
    ),
    "remove": OfflineCommand(
        "ultrafuser.gating.training.removal",
        "take a specialist out of a fused model",
        "the same command does it anew",
    ),
    "eval": OfflineCommand(
        "ultrafuser.gating.evaluation.command",
        "evaluate a fused model",
        "the same command goes on from what is in the cache",
    ),
    "data": OfflineCommand(
        "ultrafuser.gating.synthesis.command",
        "make instruction data for new domains, or clean what there is",
        "the same command goes on from what is there",
    ),
    "analyze": OfflineCommand(
        "ultrafuser.gating.analysis.command",
        "show what a gate does, and training curves",
        "the same command uses what is in the cache",
    ),
    "batch": OfflineCommand(
        "ultrafuser.server.batch.command",
        "answer a file of requests, in OpenAI's batch format",
        "what was answered is kept; the same command with --resume goes on",
    ),
    "chat": OfflineCommand(
        "ultrafuser.server.terminal.command",
        "chat in the terminal with a running server",
        "the same command begins anew",
    ),
    "doctor": OfflineCommand(
        "ultrafuser.server.doctor.command",
        "say what this machine is, and what a fused model lacks here",
        "the same command looks anew",
    ),
}


@dataclass(frozen=True)
class ServeCommand:
    """What `ultrafuser serve` was asked to do."""

    settings: ServerSettings
    engine_options: Mapping[str, Any]
    """The engine options that were given; they override the fusion file's."""


def parse_command(argv: Sequence[str], environ: Mapping[str, str]) -> ServeCommand:
    """Read the command line and the environment; prints and exits for `--help` and `--version`.

    Raises:
        SettingsError: an unknown flag or variable, or a value that does not fit.
    """
    flags = read_flags(build_parser(), argv, OPTION_NAMES, "name one fusion file, see `ultrafuser serve --help`")
    environment = read_environment(environ, OPTION_NAMES)
    settings = resolve_settings(flags, environment)
    engine = resolve(EngineOptions, flags, environment, PREFIX)
    return ServeCommand(settings, engine.model_dump(exclude_unset=True))


def read_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str], known: Collection[str], way_out: str
) -> dict[str, Any]:
    """What a command line with the engine's options says, by name. `known` are names that may have been meant,
    `way_out` is told where an argument is too many.

    Raises:
        SettingsError: an unknown flag, or one whose value is missing.
    """
    arguments, rest = parser.parse_known_args([_dashed(argument) for argument in argv])
    if rest:
        _refuse(rest[0], known, way_out)
    return vars(arguments)


def engine_sections() -> dict[str, dict[str, FieldInfo]]:
    """The engine's options, by the title of their section."""
    engine, own = EngineSettings.model_fields, EngineOptions.model_fields
    return {
        "The engine (each overrides the fusion file's `engine` section)": engine,
        "The engine's requests and metrics": {name: own[name] for name in own if name not in engine},
    }


def build_parser() -> argparse.ArgumentParser:
    """The parser with all flags, grouped; a flag that was not given leaves no attribute."""
    parser = Parser(
        prog="ultrafuser", description="Serve several specialised language models as one, fused token by token."
    )
    parser.add_argument("--version", action="version", version=f"ultrafuser {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a fused model behind the OpenAI API",
        usage="ultrafuser serve [FUSION] [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    for name, command in OFFLINE_COMMANDS.items():
        commands.add_parser(name, help=f"{command.summary} (`ultrafuser {name} --help`)")
    sections = {str(section.__doc__): section.model_fields for section in SECTIONS} | engine_sections()
    for title, fields in sections.items():
        add_flags(serve, fields, title, positional="fusion", overrides=True)
    return parser


def _dashed(argument: str) -> str:
    """`--max_model_len=4K` as `--max-model-len=4K`: vLLM takes both spellings, and so do we."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _refuse(argument: str, known: Collection[str], way_out: str) -> NoReturn:
    """Say what is wrong with an argument that no flag took."""
    flag = argument.partition("=")[0]
    if not flag.startswith("--"):
        raise SettingsError(f"{argument}: unexpected argument; {way_out}")
    name = flag.removeprefix("--").replace("-", "_")
    if name in REFUSED_OPTIONS:
        reason = REFUSED_OPTIONS[name]
    elif name in OPTION_NAMES - set(known):
        reason = "only `ultrafuser serve` has this option; leave it out"
    elif near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        reason = f"there is no such option; did you mean {flag_of(near[0])}?"
    else:  # only now, on the way out, is it worth the seconds that importing vLLM takes
        from ultrafuser.server.engine.shared.options import refusal

        reason = refusal(name)
    # Where a reason names another option, its flag is meant here.
    raise SettingsError(f"{flag}: " + re.sub(r"\w+_\w+", lambda option: flag_of(option[0]), reason))
