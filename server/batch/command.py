"""Answers a file of requests without a server: `ultrafuser batch`. See docs/operations.md.

Everything that can be wrong with the files is found before vLLM is imported, which this module does not.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser import __version__
from ultrafuser.gating.commands.flags import Parser, add_flags, resolve
from ultrafuser.gating.files import input_file
from ultrafuser.gating.model.fusion import FusionConfig, load_fusion
from ultrafuser.gating.progress_bar import counting_bar
from ultrafuser.server.batch.lines import BatchRequest, Output, custom_ids, is_success, read_requests, sole_output
from ultrafuser.server.cli import OPTION_NAMES, engine_sections, read_flags
from ultrafuser.server.engine_options import EngineOptions
from ultrafuser.server.log import configure_logging
from ultrafuser.server.settings import (
    PREFIX,
    Limits,
    Load,
    LogLevel,
    Model,
    ServerSettings,
    read_environment,
    vllm_environment,
)
from ultrafuser.server.start.importing import import_part
from ultrafuser.server.start.progress import StartupProgress
from ultrafuser.server.start.signals import Interrupted, at_stop_signals, ending_at_once, interrupt

NUM_STEPS = 3
"""Of the start; nodes of a Ray cluster have to meet, too."""


class BatchSettings(Model, Load, Limits):
    """The batch"""

    input: str
    """Requests, in OpenAI's batch format: one JSON object a line, also gzipped."""

    output: str
    """Answers, in OpenAI's batch format; a line is written when its request has ended."""

    resume: bool = False
    """Go on with an output that is there: what was answered stays, what failed is tried again."""

    log_level: LogLevel = "warning"
    """Least important lines to show; info has one for each request."""


@dataclass(frozen=True)
class BatchCommand:
    """What `ultrafuser batch` was asked to do."""

    settings: BatchSettings
    engine_options: Mapping[str, Any]
    """The engine options that were given; they override the fusion file's."""


def parse_settings(argv: Sequence[str], environ: Mapping[str, str]) -> BatchCommand:
    """Read the command line of `ultrafuser batch` and the environment; prints and exits for `--help`.

    Raises:
        SettingsError: an unknown flag or variable, or a value that does not fit.
    """
    parser = Parser(
        prog="ultrafuser batch",
        usage="ultrafuser batch IN.jsonl OUT.jsonl [options]",
        description="Answer a file of requests without a server, in OpenAI's batch format.",
    )
    fields = dict(BatchSettings.model_fields)
    for name in ("input", "output"):
        add_flags(parser, {name: fields.pop(name)}, positional=name)
    add_flags(parser, {"resume": fields.pop("resume")})
    for title, section in ({"What answers": fields} | engine_sections()).items():
        add_flags(parser, section, title, overrides=True)
    known = {*BatchSettings.model_fields, *EngineOptions.model_fields}
    flags = read_flags(parser, argv, known, "name two files, see `ultrafuser batch --help`")
    environment = read_environment(environ, OPTION_NAMES)
    engine = resolve(EngineOptions, flags, environment, PREFIX)
    settings = resolve(BatchSettings, flags, environment, PREFIX)
    return BatchCommand(settings, engine.model_dump(exclude_unset=True))


def run(argv: Sequence[str], cache: str | None = None) -> int:
    """The command; returns the exit status: 0, or 1 if a request has failed. `cache` is in the environment, too.

    Raises:
        CommandError, FusionError, GateError, EngineOptionError: one line for the user.
        EngineStartError: the engine failed.
        KeyboardInterrupt: a signal came; what was answered is in the output.
    """
    at_stop_signals(interrupt)
    command = parse_settings(argv, os.environ)
    settings = command.settings
    source = input_file(settings.input, "give requests in OpenAI's batch format, one a line")
    ids, num_lines = custom_ids(source)
    fusion = load_fusion(settings.fusion)  # what is wrong with it is told before there is an output
    try:
        with sole_output(Path(settings.output).expanduser(), ids, resumes=settings.resume) as (output, done):
            if len(done) == num_lines:
                print("all requests are answered already", file=sys.stderr)
                return 0
            failed = _answer(command, fusion, read_requests(source, done), _Answers(output, num_lines, len(done)))
    except Interrupted:
        raise KeyboardInterrupt from None
    way_on = "; the same command with --resume tries them again" if failed else ""
    print(f"{num_lines - failed:,} answered, {failed:,} failed{way_on}", file=sys.stderr, flush=True)
    return int(failed > 0)


class _Answers:
    """Where answers go, and how many there are. A context: its bar is there while it lasts."""

    def __init__(self, output: Output, total: int, done: int) -> None:
        self._output, self._total, self._done = output, total, done
        self.num_failed = 0

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self._bar = counting_bar("batch", self._total, "request", self._done)
        return self._write

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._output.write(line)
        if not is_success(line["response"], line["error"]):
            self.num_failed += 1
            self._bar.set_postfix(failed=self.num_failed, refresh=False)
        self._bar.update()


def _answer(command: BatchCommand, fusion: FusionConfig, requests: Iterator[BatchRequest], answers: _Answers) -> int:
    """Answer all; the number of those that failed."""
    settings = command.settings
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    os.environ.update(vllm_environment(os.environ, settings.log_level))
    configure_logging(settings.log_level)
    backend = command.engine_options.get("distributed_executor_backend", fusion.engine.distributed_executor_backend)
    progress = StartupProgress(NUM_STEPS + (backend == "ray"))
    progress.say(f"ultrafuser {__version__}: {fusion.name}, fused from {', '.join(fusion.specialist_names)}")
    with progress.step("import vLLM"), ending_at_once():
        answer_requests = import_part("ultrafuser.server.batch.in_process", "answer_requests")
    server = ServerSettings(**settings.model_dump(include=set(ServerSettings.model_fields)))
    answer_requests(server, command.engine_options, fusion, progress, requests, answers)
    return answers.num_failed
