"""Generation benchmarks of a running server: ask, keep every answer, score, report.

Zero-shot, temperature 0, over the OpenAI wire, so that any server can be measured. Puts the parts together; the
benchmarks themselves are in their own modules. A run that was ended, by whatever, goes on where it was.
"""

import asyncio
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser.gating.commands.endpoint import ENDPOINT_FIELDS, run_together
from ultrafuser.gating.commands.run_folder import keep_settings, sole_run
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.evaluation.benchmarks.answers import ANSWERS_FILE, AnswersFile
from ultrafuser.gating.evaluation.benchmarks.code_problems import HUMANEVAL, MBPP
from ultrafuser.gating.evaluation.benchmarks.generation import ChatClient
from ultrafuser.gating.evaluation.benchmarks.items import Answered, Benchmark, Item
from ultrafuser.gating.evaluation.benchmarks.llm_as_judge import ALPACA_EVAL, MT_BENCH
from ultrafuser.gating.evaluation.benchmarks.multiple_choice import AQUA, SAT_MATH
from ultrafuser.gating.evaluation.benchmarks.scoring import (
    SCORES_FILE,
    format_table,
    judge_all,
    summarize,
    unscored,
    write_verdicts,
)
from ultrafuser.gating.evaluation.benchmarks.sources import data_identity, draw_sample, load_items
from ultrafuser.gating.evaluation.benchmarks.truthfulqa import TRUTHFULQA
from ultrafuser.gating.evaluation.benchmarks.word_problems import GSM8K, SVAMP
from ultrafuser.gating.evaluation.settings import EvalSettings
from ultrafuser.gating.files import input_file, read_json, write_json
from ultrafuser.gating.progress_bar import counting_bar

RESULTS_FILE = "results.json"

# What all answers of a folder have in common, beside the model.
_SHARED = {"chain_of_thought", "limit", "seed", "max_tokens"}

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (GSM8K, SVAMP, AQUA, SAT_MATH, HUMANEVAL, MBPP, TRUTHFULQA, MT_BENCH, ALPACA_EVAL)
}


@dataclass(frozen=True)
class BenchmarkFile:
    """One benchmark and where its rows are."""

    name: str

    path: Path | None
    """JSON lines with the benchmark's own fields, gzipped if the name ends in `.gz`; None takes them from the hub."""

    @classmethod
    def parse(cls, argument: str) -> "BenchmarkFile":
        """`NAME=FILE`, or `NAME`.

        Raises:
            CommandError: no such benchmark, or (DataError) a file that cannot be read.
        """
        name, equals, path = argument.partition("=")
        if name not in BENCHMARKS:
            raise CommandError(f"{name}: no such benchmark; known are {', '.join(BENCHMARKS)}")
        if not equals:
            return cls(name, None)
        return cls(name, input_file(path, f"give {name}=FILE with JSON lines").resolve())


async def run_benchmarks(options: EvalSettings) -> dict[str, Any]:
    """Ask what is missing, score everything, write OUTPUT/results.json, print a table to stderr.

    Returns:
        The content of results.json: `model`, the shared settings, and `benchmarks`, which maps a name to metric,
        value, low, high, num_items, num_unanswered, num_unparsable, prompt_version, data, and where it applies
        judgement_accuracy, note, written. Benchmarks of earlier calls in the same folder stay in it.

    Raises:
        CommandError: before anything is asked: an unknown benchmark, data that cannot be read, or a folder of other
            settings; later: a server that is gone or refuses everybody. Answers so far are kept.
    """
    files = [BenchmarkFile.parse(argument) for argument in options.benchmark]
    output = options.output_folder
    if len({file.name for file in files}) < len(files):
        raise CommandError("benchmarks: one is named twice; name each once")
    chosen = {file.name: _load(file, options) for file in files}
    with sole_run(output):
        async with ChatClient(**options.model_dump(include=ENDPOINT_FIELDS)) as client:
            model = options.model or await client.first_model()
            shared = {"model": model, **options.model_dump(include=_SHARED)}
            keep_settings(output, shared)
            before = _results_before(output)
            for file in files:
                keep_settings(output / file.name, _own_settings(file))
            answered = {
                name: await _ask(BENCHMARKS[name], items, client, model, options) for name, items in chosen.items()
            }
        results = {}
        for file in files:
            scores = await asyncio.to_thread(_score, BENCHMARKS[file.name], answered[file.name], model, options)
            results[file.name] = {**scores, **_own_settings(file)}
        return _report(output, shared, {**before, **results}, results)


def prompt_version(benchmark: Benchmark) -> str:
    """Changes whenever the fixed text of a benchmark's prompts does."""
    return hashlib.sha256("\0".join(benchmark.prompts).encode()).hexdigest()[:8]


def _load(file: BenchmarkFile, options: EvalSettings) -> list[Item]:
    items = load_items(BENCHMARKS[file.name], file.path, chain_of_thought=options.chain_of_thought)
    return draw_sample(items, options.limit, options.seed, file.name)


def _own_settings(file: BenchmarkFile) -> dict[str, str]:
    benchmark = BENCHMARKS[file.name]
    return {"prompt_version": prompt_version(benchmark), "data": data_identity(benchmark, file.path)}


async def _ask(
    benchmark: Benchmark, items: Sequence[Item], client: ChatClient, model: str, options: EvalSettings
) -> Answered:
    """The answers to all requests of a benchmark; those on disk are not asked for again."""
    requests = [request for item in items for request in item.requests]
    with AnswersFile(options.output_folder / benchmark.name / ANSWERS_FILE) as answers:
        missing = answers.missing(requests)
        queue = iter(missing)  # shared by all workers
        with counting_bar(benchmark.name, len(requests), "request", len(requests) - len(missing)) as progress:

            async def work() -> None:
                for request in queue:
                    answers.append(await client.answer(request, model, options.max_tokens))
                    progress.update()

            await run_together([work() for _ in range(min(options.concurrency, len(missing)))])
        return [(item, answers.of(item)) for item in items]


def _score(benchmark: Benchmark, answered: Answered, model: str, options: EvalSettings) -> dict[str, Any]:
    folder = options.output_folder / benchmark.name
    written = benchmark.export(folder, model, answered) if benchmark.export is not None else None
    if written is not None:
        path = written.relative_to(options.output_folder).as_posix()
        return {**unscored(benchmark, answered, f"to be judged elsewhere, in {path}"), "written": path}
    if benchmark.executes_code and not options.execute_code:
        return unscored(benchmark, answered, "answers are kept; --execute-code runs them and gives the score")
    with counting_bar(f"{benchmark.name}: scoring", len(answered), "item") as progress:
        verdicts = judge_all(benchmark, answered, progress.update)
    write_verdicts(folder / SCORES_FILE, verdicts)
    return summarize(benchmark, verdicts, options.seed)


def _results_before(output: Path) -> dict[str, Any]:
    """Of earlier calls in the same folder."""
    path, way_out = output / RESULTS_FILE, "delete the file, scores are made anew from the answers"
    if not path.exists():
        return {}
    results = read_json(path, way_out).get("benchmarks")
    if not isinstance(results, dict):
        raise CommandError(f"{path}: benchmarks: missing; {way_out}")
    return results


def _report(
    output: Path, shared: Mapping[str, Any], results: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    path = output / RESULTS_FILE
    report = {**shared, "benchmarks": results}
    write_json(path, report)
    print(f"{format_table(own)}\nresults: {path}", file=sys.stderr, flush=True)
    return report
