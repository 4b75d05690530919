"""Runs benchmarks on the hand-written rows against a scripted server, in one output folder."""

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.gating.evaluation.endpoint import Endpoint, Script, serving
from tests.gating.evaluation.examples import ROWS, write_rows
from ultrafuser.gating.evaluation.benchmarks.benchmarks import run_benchmarks
from ultrafuser.gating.evaluation.settings import EvalSettings


class Runner:
    """Runs benchmarks on the hand-written rows, in one output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output"

    def settings(self, endpoint: Endpoint, *names: str, **options: Any) -> EvalSettings:
        files = tuple(f"{name}={write_rows(self.folder / f'{name}.jsonl', ROWS[name])}" for name in names)
        return EvalSettings(benchmark=files, output=str(self.output), base_url=endpoint.base_url, **options)

    def __call__(self, endpoint: Endpoint, *names: str, **options: Any) -> dict[str, Any]:
        report = asyncio.run(run_benchmarks(self.settings(endpoint, *names, **options)))
        assert report == json.loads((self.output / "results.json").read_text())
        return report["benchmarks"]

    def lines(self, *path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.joinpath(*path).read_text().splitlines()]


def result_of(runner: Runner, name: str, script: Script, **options: Any) -> dict[str, Any]:
    with serving(script) as endpoint:
        return runner(endpoint, name, **options)[name]
