"""What every benchmark's command line shares: options, a clean standard output, and the result at the end."""

import gc
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from benchmarks.environment import describe_environment
from benchmarks.measure import Comparison, Frozen
from benchmarks.result import RESULTS_FOLDER, Question, Result, today
from ultrafuser.gating.commands.flags import Settings, parse_command
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig, inspect_fusion, load_fusion
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.server.settings import vllm_environment

ENVIRON: Mapping[str, str] = dict(os.environ)
"""The environment as it was before vLLM, which adds variables of its own, was imported."""


class Options(Frozen):
    """What a benchmark was asked to do."""

    fusion: str = "demo"
    """Fusion file or preset."""

    cache: Path | None = None
    """Folder of prepared weights; default: ultrafuser's own."""

    quick: bool = False
    """Tiny sizes, to see that it works; files no result."""

    only: Literal["fused", "baseline"] | None = None
    """Run one side; then there are no ratios."""

    results: Path | None = None
    """Folder for the result; default: benchmarks/results."""

    @property
    def runs_fused(self) -> bool:
        """Whether our side is run."""
        return self.only != "baseline"

    @property
    def runs_baseline(self) -> bool:
        """Whether the other side is run."""
        return self.only != "fused"

    @property
    def folder(self) -> Path | None:
        """Where the result is filed; None: nowhere."""
        return self.results or (None if self.quick or self.only else RESULTS_FOLDER)

    def load(self) -> tuple[FusionConfig, FusedModelInfo]:
        """The fusion, its weights prepared, and what its models are."""
        fusion = materialize(load_fusion(self.fusion), self.cache)
        return fusion, inspect_fusion(fusion)


def run_benchmark(
    question: Question, measure: Callable[[Any], Iterable[Comparison]], model: type[Options] = Options
) -> None:
    """Run one benchmark as a program. A missed bar is a result (exit status 0), an exception is an error.

    What was measured before an error, or before the process was told to end, is filed all the same, and says so.
    """
    options = parse_options(model, question.name, sys.argv[1:], description=f"{question.text} {question.method}")
    environment = describe_environment(f"benchmarks.{question.name}", sys.argv[1:])
    os.environ.update(vllm_environment(os.environ, "warning"))  # what the server gives its own engine
    # Otherwise a SIGTERM would end this process without its `finally` clauses, and leave servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with _only_the_result_on_stdout() as stdout:
        result = Result(question=question, date=today(), comparisons=(), environment=environment)
        try:
            for comparison in measure(options):
                result = result.model_copy(update={"comparisons": (*result.comparisons, comparison)})
        except BaseException as error:
            if result.comparisons and options.folder is not None:
                result = result.model_copy(update={"ended_by": f"{type(error).__name__}: {error}"})
                say(f"{question.name}: filed what was measured until then: {result.write(options.folder)}")
            raise
        summary: dict[str, Any] = {**result.summary, "file": None}
        if options.folder is not None:
            summary["file"] = str(result.write(options.folder))
        gc.collect()  # an engine that is only collected after its modules would complain
        print(json.dumps(summary), file=stdout, flush=True)


def say(text: str) -> None:
    """A line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


def parse_options(
    model: type[Settings], name: str, argv: Sequence[str], *, description: str, usage: str = "", positional: str = ""
) -> Settings:
    """Read a benchmark's command line; prints and exits for `--help` and, with status 2, for what cannot be done."""
    prog = f"python -m benchmarks.{name}"
    usage, text = f"{usage} [options]".strip(), textwrap.fill(description, 110)
    try:
        return parse_command(model, argv, prog=prog, usage=usage, description=text, positional=positional)
    except CommandError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def _only_the_result_on_stdout() -> Iterator[TextIO]:
    """Yield the true standard output; what vLLM, its processes and everybody else print goes to stderr meanwhile."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        yield stdout
