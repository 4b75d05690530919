"""The `ultrafuser` command."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib import import_module
from types import FrameType

from ultrafuser import __version__
from ultrafuser.gating.errors import UserError
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.server.access.keys import with_all_keys
from ultrafuser.server.cli import OFFLINE_COMMANDS, OPTION_NAMES, ServeCommand, parse_command
from ultrafuser.server.log import LogStream, configure_logging
from ultrafuser.server.settings import EngineStartError, SettingsError, read_environment, vllm_environment
from ultrafuser.server.start.listener import listen_on
from ultrafuser.server.start.progress import StartupProgress

NUM_STEPS = 4
EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130


class Interrupted(BaseException):
    """A signal came before the server listened.

    Not KeyboardInterrupt: vLLM swallows that while it waits for its engine, and then waits for ever."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 (failed while serving), 2 (what was asked for cannot be done)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] and arguments[0] in OFFLINE_COMMANDS:
            return _offline(arguments[0], arguments[1:])
        return _serve(parse_command(arguments, os.environ))
    except (Interrupted, KeyboardInterrupt):
        print("\nultrafuser: interrupted before it was ready", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (UserError, EngineStartError) as error:  # of any other error the traceback has to be seen
        print(f"ultrafuser: {error}", file=sys.stderr)
        return EXIT_FAILED if isinstance(error, EngineStartError) else EXIT_WRONG_INPUT


def _serve(command: ServeCommand) -> int:
    """What is cheap to check comes first: the fusion file and the port, then seconds of imports, weights last."""
    settings = with_all_keys(command.settings)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    # One process serves; of a left-over folder it would show old series.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    os.environ.update(vllm_environment(os.environ, settings.log_level))
    configure_logging(settings.log_level, settings.log_format)
    fusion = load_fusion(settings.fusion)
    with closing(listen_on(settings.host, settings.port)) as listener:
        progress = StartupProgress(NUM_STEPS, LogStream() if settings.log_format == "json" else None)
        progress.say(f"ultrafuser {__version__}: {fusion.name}, fused from {', '.join(fusion.specialist_names)}")
        with progress.step("import vLLM"):
            serve = _import_serve()
        return serve(settings, command.engine_options, fusion, listener, progress)


def _import_serve() -> Callable[..., int]:
    """The part that needs vLLM, which has to be installed, in the version that the engine works with."""
    try:
        from ultrafuser.server.start.launch import serve
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise SettingsError("vLLM is not installed; install ultrafuser[cuda], or ultrafuser[cpu]") from error
    except RuntimeError as error:  # the engine package's refusal of another version, by name
        raise SettingsError(str(error)) from error
    return serve


def _offline(command: str, arguments: Sequence[str]) -> int:
    """The commands of `gating` have settings of their own; of the server's they share the cache folder."""
    cache = read_environment(os.environ, OPTION_NAMES).get("cache")
    module = import_module(OFFLINE_COMMANDS[command].module)
    try:
        return int(module.run(arguments, cache))
    except KeyboardInterrupt:
        print(f"\nultrafuser: interrupted; {OFFLINE_COMMANDS[command].way_on}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise Interrupted


if __name__ == "__main__":
    sys.exit(main())
