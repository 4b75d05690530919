"""`ultrafuser batch` from its command line to the end, over an engine whose tokens are written down: what it says, what
it leaves behind, and what becomes of it at Ctrl-C."""

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.scripted import SCRIPT
from tests.server.start.test_launch import Engine, press_ctrl_c
from ultrafuser.server.__main__ import EXIT_FAILED, EXIT_INTERRUPTED, main
from ultrafuser.server.requests.grammars import GrammarCheck
from ultrafuser.server.start import launch

pytestmark = [
    pytest.mark.usefixtures("process_as_before"),
    # vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
]


@pytest.fixture
def engine(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Loaded in the place of a real one; was ended once when the command has."""
    engine = Engine(vllm_config)

    async def close(_: GrammarCheck) -> None:
        pass

    monkeypatch.setattr(launch, "_start_engine", lambda *_: engine)
    monkeypatch.setattr(launch, "adopt_vllm_logging", lambda: None)
    monkeypatch.setattr(GrammarCheck, "close", close)
    yield engine
    assert engine.num_ended == 1


class Files:
    """The two files, and the command that goes from one to the other."""

    def __init__(self, folder: Path, fusion: Path) -> None:
        self.source, self.output, self.fusion = folder / "in.jsonl", folder / "out.jsonl", fusion

    def ask(self, *names: str, **body: Any) -> None:
        rows = [
            {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": "Is it?"} | body}
            for name in names
        ]
        self.source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def run(self, *options: str) -> int:
        return main(["batch", str(self.source), str(self.output), "--fusion", str(self.fusion), *options])

    def statuses(self) -> dict[str, int]:
        rows = [json.loads(line) for line in self.output.read_text().splitlines()]
        assert len({row["custom_id"] for row in rows}) == len(rows)
        return {row["custom_id"]: row["response"]["status_code"] for row in rows}


@pytest.fixture
def files(tmp_path: Path, fusion: Any) -> Files:
    return Files(tmp_path, Path(fusion.specialists[0].model).parent / "fusion.yaml")


def test_every_request_has_its_line(files: Files, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    files.ask("a", "b", "c")
    assert files.run() == 0
    assert files.statuses() == {"a": 200, "b": 200, "c": 200}
    assert SCRIPT in files.output.read_text()
    said = capsys.readouterr().err
    assert "batch: 3 of 3 requests to go\n" in said
    assert said.endswith("3 answered, 0 failed\n")


def test_what_failed_is_told_and_tried_again(
    files: Files, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files.ask("a", "b", temperature=9)
    assert files.run() == EXIT_FAILED
    assert capsys.readouterr().err.endswith("0 answered, 2 failed; the same command with --resume tries them again\n")
    assert files.statuses() == {"a": 400, "b": 400}
    files.ask("a", "b")
    engine.num_ended = 0
    assert files.run("--resume") == 0
    assert files.statuses() == {"a": 200, "b": 200}


def test_the_servers_own_key_is_not_asked_of_the_batch(
    files: Files, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ULTRAFUSER_API_KEY", "secret")
    files.ask("a")
    assert files.run() == 0
    assert files.statuses() == {"a": 200}


@pytest.mark.parametrize("num_signals", [1, 3])
def test_ctrl_c_keeps_what_is_written_and_resume_goes_on(
    files: Files, engine: Engine, capsys: pytest.CaptureFixture[str], num_signals: int
) -> None:
    """Nothing else is written: a request that is cut off is no failure."""
    names = [f"request-{index}" for index in range(40)]
    files.ask(*names)
    num_begun = 0

    async def interrupt_later() -> None:
        nonlocal num_begun
        num_begun += 1
        if num_begun == 20:
            while len(files.statuses()) < 9:
                await asyncio.sleep(0.01)
            for _ in range(num_signals):
                press_ctrl_c()
                await asyncio.sleep(0.01)
        if num_begun >= 10:
            await asyncio.Event().wait()

    engine.before_tokens = interrupt_later
    assert files.run() == EXIT_INTERRUPTED
    assert capsys.readouterr().err.endswith(
        "\nultrafuser: interrupted; what was answered is kept; the same command with --resume goes on\n"
    )
    kept = files.output.read_text()
    assert set(files.statuses().values()) == {200}
    assert len(files.statuses()) == 9
    engine.before_tokens = lambda: asyncio.sleep(0)
    engine.prompts.clear()
    engine.num_ended = 0
    assert files.run("--resume") == 0
    assert files.output.read_text().startswith(kept)
    assert files.statuses() == dict.fromkeys(names, 200)
    assert len(engine.prompts) == len(names) - 9


@pytest.mark.parametrize(("placement", "status"), [("split", EXIT_FAILED), ("shared", EXIT_INTERRUPTED)])
def test_an_engine_that_hangs_for_good_ends_the_batch_as_it_ends_the_server(
    files: Files, engine: Engine, capsys: pytest.CaptureFixture[str], placement: str, status: int
) -> None:
    """It waited until somebody came to look: the batch asked no one but the engine's processes, which were there."""
    names = ["a", "b", "c"]
    num_begun = 0

    async def hang() -> None:
        nonlocal num_begun
        num_begun += 1
        if num_begun == len(names):
            while len(files.statuses()) < 2:
                await asyncio.sleep(0.01)
            listeners[-1](None)  # a step: the first one may take ten times as long
            engine.num_unfinished = 1
            engine.is_paused = asyncio.Event().wait
            asyncio.get_running_loop().call_later(3.0, press_ctrl_c)
            await asyncio.Event().wait()

    engine.before_tokens = hang
    listeners: list[Any] = []
    engine.steps.listen = listeners.append
    files.ask(*names)
    assert files.run("--placement", placement, "--stall-timeout", "0.5") == status
    assert len(files.statuses()) == 2
    told = "ultrafuser: the engine hangs: its ranks wait for one another; the same command with --resume goes on\n"
    assert capsys.readouterr().err.endswith(told) == (placement == "split")


def test_a_signal_while_the_weights_are_loaded_leaves_an_output_to_begin_with(
    files: Files, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> Engine:
        press_ctrl_c()
        return engine

    with monkeypatch.context() as patch:
        patch.setattr(launch, "_start_engine", load)
        files.ask("a")
        assert files.run() == EXIT_INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err
    assert files.run() == 0
    assert files.statuses() == {"a": 200}


def test_a_full_disk_is_told_in_one_line(
    files: Files, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "write", fail)
    files.ask("a", "b")
    assert files.run() == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("cannot be written (No space left on device); make room, then --resume goes on")
    )


def test_no_more_are_asked_at_a_time_than_the_engine_takes(
    files: Files, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_running, numbers = 0, []

    async def count() -> None:
        nonlocal num_running
        num_running += 1
        numbers.append(num_running)
        await asyncio.sleep(0.005)
        num_running -= 1

    monkeypatch.setattr(engine.vllm_config.scheduler_config, "max_num_queued_reqs", 5)
    engine.before_tokens = count
    files.ask(*map(str, range(40)))
    assert files.run() == 0
    assert (len(numbers), max(numbers)) == (40, 5)
