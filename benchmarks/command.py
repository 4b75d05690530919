"""What every benchmark's command line shares: options, a clean standard output, and the result at the end."""

import argparse
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.environment import describe_environment
from benchmarks.measure import Comparison
from benchmarks.result import RESULTS_FOLDER, Question, Result, today
from gating.model.fusion import FusedModelInfo, FusionConfig, inspect_fusion, load_fusion
from gating.model.materialize import materialize
from server.settings import vllm_environment

ENVIRON: Mapping[str, str] = dict(os.environ)
"""The environment as it was before vLLM, which adds variables of its own, was imported."""


@dataclass(frozen=True)
class Options:
    """What a benchmark was asked to do."""

    fusion: str
    """Fusion file or preset."""

    cache: Path | None
    """Folder of prepared weights; None: the default one."""

    is_quick: bool
    """Tiny sizes: shows that the benchmark works, measures nothing worth keeping."""

    runs_fused: bool
    """Whether our side is run."""

    runs_baseline: bool
    """Whether the other side is run."""

    results: Path | None
    """Where the result is filed; None: nowhere."""

    def load(self) -> tuple[FusionConfig, FusedModelInfo]:
        """The fusion, its weights prepared, and what its models are."""
        fusion = materialize(load_fusion(self.fusion), self.cache)
        return fusion, inspect_fusion(fusion)


def run_benchmark(question: Question, measure: Callable[[Options], Sequence[Comparison]]) -> None:
    """Run one benchmark as a program. A missed bar is a result (exit status 0), an exception is an error."""
    options = _parse(question, sys.argv[1:])
    environment = describe_environment(f"benchmarks.{question.name}", sys.argv[1:])
    os.environ.update(vllm_environment(os.environ, "warning"))  # what the server gives its own engine
    # Otherwise a SIGTERM would end this process without its `finally` clauses, and leave servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with _only_the_result_on_stdout() as stdout:
        comparisons = tuple(measure(options))
        result = Result(question=question, date=today(), comparisons=comparisons, environment=environment)
        summary: dict[str, Any] = {**result.summary, "file": None}
        if options.results is not None:
            summary["file"] = str(result.write(options.results))
        gc.collect()  # an engine that is only collected after its modules would complain
        print(json.dumps(summary), file=stdout, flush=True)


def say(text: str) -> None:
    """A line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


def _parse(question: Question, argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.{question.name}", description=f"{question.text} {question.method}", allow_abbrev=False
    )
    parser.add_argument("--fusion", default="demo", help="fusion file or preset (default: demo)")
    parser.add_argument("--cache", type=Path, help="folder of prepared weights (default: ultrafuser's own)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; files no result")
    parser.add_argument("--only", choices=["fused", "baseline"], help="run one side; then there are no ratios")
    parser.add_argument("--results", type=Path, help="folder for the result (default: benchmarks/results)")
    arguments = parser.parse_args(argv)
    keeps_result = not (arguments.quick or arguments.only)
    return Options(
        fusion=arguments.fusion,
        cache=arguments.cache,
        is_quick=arguments.quick,
        runs_fused=arguments.only != "baseline",
        runs_baseline=arguments.only != "fused",
        results=arguments.results or (RESULTS_FOLDER if keeps_result else None),
    )


@contextmanager
def _only_the_result_on_stdout() -> Iterator[TextIO]:
    """Yield the true standard output; what vLLM, its processes and everybody else print goes to stderr meanwhile."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        yield stdout
