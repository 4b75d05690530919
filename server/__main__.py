"""The `ultrafuser` command."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from types import FrameType

from gating.fusion import load_fusion
from server import __version__
from server.cli import ServeCommand, parse_command
from server.listener import listen_on
from server.log import configure_logging
from server.progress import StartupProgress
from server.settings import SettingsError, vllm_environment

NUM_STEPS = 4
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130


class Interrupted(BaseException):
    """A signal came before the server listened.

    Not KeyboardInterrupt: vLLM swallows that while it waits for its engine, and then waits for ever."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 (failed while serving), 2 (what was asked for cannot be done)."""
    try:
        return _serve(parse_command(sys.argv[1:] if argv is None else argv, os.environ))
    except (Interrupted, KeyboardInterrupt):
        print("\nultrafuser: interrupted before it was ready", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ValueError as error:
        if not _is_expected(error):
            raise
        print(f"ultrafuser: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT


def _serve(command: ServeCommand) -> int:
    """What is cheap to check comes first: the fusion file and the port, then seconds of imports, weights last."""
    settings = command.settings
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    os.environ.update(vllm_environment(os.environ, settings.log_level))
    configure_logging(settings.log_level)
    fusion = load_fusion(settings.fusion)
    with closing(listen_on(settings.host, settings.port)) as listener:
        progress = StartupProgress(NUM_STEPS)
        progress.say(f"ultrafuser {__version__}: {fusion.name}, fused from {', '.join(fusion.specialist_names)}")
        with progress.step("import vLLM"):
            from server.launch import serve
        return serve(settings, command.engine_options, fusion, listener, progress)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise Interrupted


def _is_expected(error: ValueError) -> bool:
    """Whether the message alone helps the user; of anything else, the traceback has to be seen."""
    from gating.schema import FusionError

    if isinstance(error, SettingsError | FusionError):
        return True
    from gating.gate import GateError
    from server.engine.options import EngineOptionError

    return isinstance(error, GateError | EngineOptionError)


if __name__ == "__main__":
    sys.exit(main())
