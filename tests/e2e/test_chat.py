"""`ultrafuser chat` in a real terminal, with a real server."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.conftest import WIDE_KEY
from tests.e2e.process import ServerProcess, clean_environment, wait_for
from tests.e2e.terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, UP, Terminal, pasted, plain

COMMAND = (sys.executable, "-m", "ultrafuser.server", "chat")
PROMPT = ">"
COLOURS = ("36", "33", "35")
"""SGR codes of the three specialists."""


def chat(server: ServerProcess, **environ: str) -> Terminal:
    """A chat with a server, the prompt is there; the key is that of the wide one."""
    keys = {"OPENAI_API_KEY": WIDE_KEY}
    terminal = Terminal([*COMMAND, "--base-url", f"{server.url}/v1"], keys | environ)
    terminal.wait_for_prompt(PROMPT)
    return terminal


def ask(terminal: Terminal, keys: str) -> str:
    """Type keys and Enter; what is shown up to the next prompt."""
    begin = len(terminal.shown)
    terminal.type(keys + ENTER)
    terminal.wait_for_prompt(PROMPT, begin)
    return terminal.shown[begin:]


def saved(terminal: Terminal, path: Path) -> Any:
    """The conversation, as it is saved."""
    assert f"written: {path}" in ask(terminal, f"/save {path}")
    return json.loads(path.read_text())


def answer_of(server: ServerProcess, messages: list[dict[str, str]]) -> Any:
    """The choice that the API gives for these messages."""
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"messages": messages, "gate_weights": True},
        headers={"Authorization": f"Bearer {WIDE_KEY}"},
        timeout=120,
    )
    return response.json()["choices"][0]


def test_a_conversation_is_that_of_the_api(wide_server: ServerProcess, tmp_path: Path) -> None:
    """Greedy: texts and weights are equal; the second answer has read the first turn and the system prompt."""
    with chat(wide_server) as terminal:
        assert "text code math" in terminal.shown
        first = ask(terminal, "hello there")
        assert "the system prompt is set" in ask(terminal, "/system Be brief.")
        ask(terminal, "and more")
        told = saved(terminal, tmp_path / "chat.json")
        terminal.type("/quit" + ENTER)
        assert terminal.wait_until_it_ends() == 0
    assert [message["role"] for message in told["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    system, *turns = told["messages"]
    for messages, own in zip(([], [system, *turns[:2]]), told["answers"], strict=True):
        question = turns[len(messages) // 2 * 2 if messages else 0]
        choice = answer_of(wide_server, [*messages, question])
        text = "".join(token["text"] for token in own["tokens"])
        assert text == choice["message"]["content"] != ""
        for token, weights in zip(own["tokens"], choice["gate_weights"]["content"], strict=True):
            assert token["gate_weights"] == pytest.approx(weights, abs=1e-4)  # another batch adds up in another order
        assert own["mean_weights"] == pytest.approx(choice["gate_weights"]["mean"], abs=1e-4)
        assert own["finish_reason"] == choice["finish_reason"]
    assert turns[1]["content"].strip() in first
    assert told["specialists"] == ["text", "code", "math"]


def coloured_parts(raw: str) -> list[tuple[str, str]]:
    """Colour and text of what is shown in one of the specialists' colours."""
    return [(code, plain(text)) for code, text in re.findall(r"\x1b\[0;(3[356])m(.*?)\x1b\[0m", raw, re.DOTALL)]


def test_each_token_has_the_colour_of_the_specialist_that_leads(wide_server: ServerProcess, tmp_path: Path) -> None:
    with chat(wide_server) as terminal:
        begin = len(terminal.raw)
        ask(terminal, "hello there")
        raw = terminal.raw[begin:]
        told = saved(terminal, tmp_path / "chat.json")
        weights = ask(terminal, "/weights")
        terminal.type(CTRL_D)
        assert terminal.wait_until_it_ends() == 0
    tokens = told["answers"][0]["tokens"]
    leaders = [max(range(3), key=token["gate_weights"].__getitem__) for token in tokens]
    expected = [
        (COLOURS[leader], token["text"]) for leader, token in zip(leaders, tokens, strict=True) if token["text"]
    ]
    assert coloured_parts(raw) == expected
    for index, (name, mean) in enumerate(zip(told["specialists"], told["answers"][0]["mean_weights"], strict=True)):
        (row,) = [line for line in weights.splitlines() if line.startswith(name)]
        assert f"{mean:.3f}" in row
        assert f"leads {leaders.count(index)} of {len(tokens)}" in row


@pytest.mark.parametrize(
    ("environ", "unwanted"), [({"NO_COLOR": "1"}, r"\x1b\[[0-9;]*[349][0-9]m"), ({"TERM": "dumb"}, r"\x1b\[[0-9;]*m")]
)
def test_where_there_is_no_colour_nothing_is_coloured(
    wide_server: ServerProcess, environ: dict[str, str], unwanted: str
) -> None:
    with chat(wide_server, **environ) as terminal:
        shown = ask(terminal, "hello there")
        assert answer_of(wide_server, [{"role": "user", "content": "hello there"}])["message"]["content"] in shown
        assert re.search(unwanted, terminal.raw) is None
        terminal.type(CTRL_D)
        assert terminal.wait_until_it_ends() == 0


def test_a_pasted_text_of_several_lines_is_one_message(wide_server: ServerProcess, tmp_path: Path) -> None:
    """Elsewhere it was sent line by line. A pasted line that looks like a command is none."""
    text = "one\ntwo\n\n/quit\nthree"
    with chat(wide_server) as terminal:
        ask(terminal, pasted(text))
        ask(terminal, f"typed{ALT_ENTER}by hand")
        told = saved(terminal, tmp_path / "chat.json")
    assert [message["content"] for message in told["messages"][::2]] == [text, "typed\nby hand"]


def test_the_arrow_keys_bring_messages_back(wide_server: ServerProcess, tmp_path: Path) -> None:
    with chat(wide_server) as terminal:
        ask(terminal, "the first")
        ask(terminal, "the second")
        ask(terminal, UP + UP)
        told = saved(terminal, tmp_path / "chat.json")
    assert [message["content"] for message in told["messages"][::2]] == ["the first", "the second", "the first"]


def num_running(server: ServerProcess) -> float:
    return server.metric("vllm:num_requests_running")


def is_answering(terminal: Terminal, begin: int) -> bool:
    """Whether something is shown behind the question, or the prompt again."""
    _, question, shown = terminal.shown[begin:].rpartition("tell me everything")
    return bool(question) and (len(shown) > 10 or ends_with_prompt(shown))


def ends_with_prompt(shown: str) -> bool:
    return shown.rstrip(" ").endswith(f"\n{PROMPT}")


@contextmanager
def paused_answer(terminal: Terminal, server: ServerProcess) -> Iterator[int]:
    """An answer in whose middle the server stands still; gives where it begins in what is shown.

    Answers are drawn and may be short, so one that has ended before is asked for again.
    """
    process = psutil.Process(server.process.pid)
    for _ in range(20):
        begin = len(terminal.shown)
        terminal.type("tell me everything" + ENTER)
        wait_for(partial(is_answering, terminal, begin), "an answer")
        process.suspend()
        try:
            time.sleep(0.5)  # what it had sent is shown
            if not ends_with_prompt(terminal.shown[begin:]):
                yield begin
                return
        finally:
            process.resume()
        terminal.wait_for_prompt(PROMPT, begin)
    pytest.fail("every answer ended at once")


def test_ctrl_c_stops_an_answer_and_not_the_chat(server: ServerProcess, tmp_path: Path) -> None:
    """What is typed or pasted meanwhile is neither sent nor a command: the chat is still there afterwards."""
    with chat(server) as terminal:
        with paused_answer(terminal, server) as begin:
            terminal.type("/quit" + ENTER + "more" + ENTER)
            terminal.type(CTRL_C)
            terminal.wait_for("[stopped]", begin)
        terminal.wait_for_prompt(PROMPT, begin)
        wait_for(lambda: not num_running(server), "the server has ended the request")
        told = saved(terminal, tmp_path / "chat.json")
        assert [message["role"] for message in told["messages"][-2:]] == ["user", "assistant"]
        assert told["messages"][-1]["content"].strip()
        assert told["answers"][-1]["finish_reason"] == "stopped"
        terminal.type("half a line" + CTRL_C)  # at the prompt it gives the line up
        assert "no such command" in ask(terminal, "/nonsense")
        terminal.type(CTRL_D)
        assert terminal.wait_until_it_ends() == 0


def test_a_turn_that_fails_leaves_nothing_behind(server: ServerProcess, tmp_path: Path) -> None:
    """Elsewhere the message stayed in the conversation: two of the user's turns in a row."""
    with chat(server) as terminal:
        shown = ask(terminal, pasted("too long " * 1000))
        (line,) = [line for line in shown.splitlines() if line.startswith("ultrafuser: ")]
        assert "HTTP 400: " in line
        assert line.endswith("; the message is not kept in the conversation")
        assert ask(terminal, "/weights").count("there is no answer yet") == 1
        begin = len(terminal.shown)
        terminal.type(UP + UP)  # the text is there for another try
        terminal.wait_for("too long too long", begin)
        terminal.type(CTRL_C)
        terminal.wait_for_prompt(PROMPT, begin)
        begin = len(terminal.shown)
        terminal.type("short" + ENTER)
        wait_for(lambda: len(terminal.shown) > begin + 30, "an answer")
        terminal.type(CTRL_C)
        terminal.wait_for_prompt(PROMPT, begin)
        told = saved(terminal, tmp_path / "chat.json")
    assert [message["role"] for message in told["messages"]] == ["user", "assistant"]
    assert told["messages"][0]["content"] == "short"


def test_a_file_that_is_there_is_not_replaced(wide_server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("mine")
    with chat(wide_server) as terminal:
        assert "is there already; name another file" in ask(terminal, f"/save {path}")
        assert "name a file" in ask(terminal, "/save")
        assert "/weights" in ask(terminal, "/help")
    assert path.read_text() == "mine"


def run(*arguments: str, message: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """The command without a terminal."""
    return subprocess.run(
        [*COMMAND, *arguments],
        input=message,
        capture_output=True,
        text=True,
        env=clean_environment() | environ,
        timeout=120,
    )


def test_of_a_pipe_all_is_one_message_and_the_answer_is_plain(wide_server: ServerProcess) -> None:
    done = run("--base-url", f"{wide_server.url}/v1", message="one\ntwo\n", ULTRAFUSER_API_KEY=f"{WIDE_KEY},another")
    assert done.returncode == 0, done.stderr
    choice = answer_of(wide_server, [{"role": "user", "content": "one\ntwo"}])
    assert done.stdout == choice["message"]["content"] + "\n"
    assert done.stderr == f"[{choice['finish_reason']}]\n"


def test_what_cannot_be_asked_is_one_line_and_status_2(wide_server: ServerProcess) -> None:
    url = f"{wide_server.url}/v1"
    for arguments, complaint in [
        (("--base-url", "http://127.0.0.1:9/v1"), "base_url: no server at http://127.0.0.1:9/v1"),
        (("--base-url", "nonsense"), "base_url: 'nonsense' is no address"),
        (("--base-url", url, "--api-key", "wrong"), "api_key: the server refuses it (HTTP 401"),
        (("--base-url", url, "--api-key", WIDE_KEY, "--model", "gpt"), "has no 'gpt'; it has tiny"),
        (("--base-url", url, "--api-key", WIDE_KEY), "no message: standard input is empty"),
        (("--base-url", url, "--demo"), "--demo: starts a server of its own; leave --base-url out"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
    ]:
        done = run(*arguments)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2
        assert line.startswith("ultrafuser: ")
        assert complaint in line


def family_of(pid: int) -> list[psutil.Process]:
    """A process, and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


@pytest.mark.slow
@pytest.mark.long
def test_the_demo_is_started_for_a_chat_and_ended_with_it(model_cache: Path) -> None:
    """A server's own settings in the environment are not the demo's: with its key the chat would be refused."""
    environ = {"ULTRAFUSER_CACHE": str(model_cache), "ULTRAFUSER_API_KEY": "secret", "ULTRAFUSER_MAX_MODEL_LEN": "8"}
    with Terminal([*COMMAND, "--demo"], environ) as terminal:
        terminal.wait_for_prompt(PROMPT, seconds=280)
        begin = len(terminal.shown)
        terminal.type("What is 2 + 3?" + ENTER)
        wait_for(lambda: len(terminal.shown) > begin + 20, "an answer")
        processes = family_of(terminal.pid)
        assert len(processes) > 3
        terminal.type(CTRL_C)
        terminal.wait_for_prompt(PROMPT, begin)
        assert "=" in ask(terminal, "/help") or "/save" in terminal.shown
        terminal.type("/quit" + ENTER)
        assert terminal.wait_until_it_ends() == 0
    assert are_gone(processes)


@pytest.mark.parametrize("how", ["Ctrl-C", "kill"])
@pytest.mark.long
def test_the_demo_ends_with_a_chat_that_ends_before_it_is_ready(how: str, model_cache: Path) -> None:
    with Terminal([*COMMAND, "--demo"], {"ULTRAFUSER_CACHE": str(model_cache)}) as terminal:
        terminal.wait_for("[1/4] import vLLM")
        processes = family_of(terminal.pid)
        assert len(processes) > 1
        if how == "Ctrl-C":
            terminal.type(CTRL_C)
            assert terminal.wait_until_it_ends() == 130
            assert "ultrafuser: interrupted; the same command begins anew" in terminal.shown
            assert "Traceback" not in terminal.shown
        else:
            processes[0].kill()
            terminal.wait_until_it_ends()
        wait_for(lambda: are_gone(processes), "the demo has ended")
