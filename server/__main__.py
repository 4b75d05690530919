"""The `ultrafuser` command."""

import os
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from importlib import import_module

from ultrafuser.server.start.signals import (
    EXIT_INTERRUPTED,
    LAST_LINE,
    Interrupted,
    at_stop_signals,
    ending_at_once,
    interrupt,
)

with ending_at_once():  # they take a second
    from ultrafuser import __version__
    from ultrafuser.gating.errors import UserError
    from ultrafuser.gating.model.fusion import FusionConfig, load_fusion
    from ultrafuser.server.access.keys import with_all_keys
    from ultrafuser.server.cli import OFFLINE_COMMANDS, OPTION_NAMES, parse_command
    from ultrafuser.server.log import LogStream, configure_logging
    from ultrafuser.server.settings import (
        EngineStartError,
        ServerSettings,
        read_environment,
        vllm_environment,
    )
    from ultrafuser.server.start.importing import import_part
    from ultrafuser.server.start.listener import listen_on, meeting_points
    from ultrafuser.server.start.progress import StartupProgress

NUM_STEPS = 4
EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 (failed while serving), 2 (what was asked for cannot be done)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] and arguments[0] in OFFLINE_COMMANDS:
            return _offline(arguments[0], arguments[1:])
        return _serve(arguments)
    except (Interrupted, KeyboardInterrupt):
        print(LAST_LINE, end="", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (UserError, EngineStartError) as error:  # of any other error the traceback has to be seen
        print(f"ultrafuser: {error}", file=sys.stderr)
        return EXIT_FAILED if isinstance(error, EngineStartError) else EXIT_WRONG_INPUT


def _serve(arguments: Sequence[str]) -> int:
    """What is cheap to check comes first: the fusion file and the port, then seconds of imports, weights last."""
    at_stop_signals(interrupt)
    command = parse_command(arguments, os.environ)
    settings = with_all_keys(command.settings)
    # One process serves; of a left-over folder it would show old series.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    os.environ.update(vllm_environment(os.environ, settings.log_level))
    configure_logging(settings.log_level, settings.log_format)
    fusion = load_fusion(settings.fusion)
    backend = command.engine_options.get("distributed_executor_backend", fusion.engine.distributed_executor_backend)
    progress = StartupProgress(
        _num_steps(settings, backend == "ray"), LogStream() if settings.log_format == "json" else None
    )
    if settings.node_rank:
        _introduce(fusion, progress)
        with progress.step("import vLLM"), ending_at_once():
            follow = import_part("ultrafuser.server.start.following", "follow")
        return follow(settings, command.engine_options, fusion, progress)
    with (
        closing(listen_on(settings.host, settings.port)) as listener,
        meeting_points(settings) if settings.nnodes > 1 else nullcontext() as points,
    ):
        _introduce(fusion, progress)
        with progress.step("import vLLM"), ending_at_once():
            serve = import_part("ultrafuser.server.start.launch", "serve")
        return serve(settings, command.engine_options, fusion, listener, progress, points)


def _num_steps(settings: ServerSettings, uses_ray: bool) -> int:
    """A node that others have to meet has one step more; those that do not serve generate nothing themselves."""
    return NUM_STEPS + (settings.nnodes > 1 or uses_ray) - (settings.node_rank > 0)


def _introduce(fusion: FusionConfig, progress: StartupProgress) -> None:
    progress.say(f"ultrafuser {__version__}: {fusion.name}, fused from {', '.join(fusion.specialist_names)}")


def _offline(command: str, arguments: Sequence[str]) -> int:
    """The other commands have settings of their own; of the server's all share the cache folder."""
    cache = read_environment(os.environ, OPTION_NAMES).get("cache")
    with ending_at_once():
        module = import_module(OFFLINE_COMMANDS[command].module)
    try:
        return int(module.run(arguments, cache))
    except KeyboardInterrupt:
        print(f"\nultrafuser: interrupted; {OFFLINE_COMMANDS[command].way_on}", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
