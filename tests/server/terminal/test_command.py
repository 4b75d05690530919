"""A chat with a server that fails in every way: what is shown, and what the next message is sent with."""

import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ultrafuser.gating.data.conversations import Conversation, DataFile, read_conversations
from ultrafuser.gating.errors import EndpointError
from ultrafuser.gating.files import write_json_lines
from ultrafuser.server.__main__ import main
from ultrafuser.server.terminal.chat_client import ChatClient
from ultrafuser.server.terminal.command import Chat, _key_of
from ultrafuser.server.terminal.dialogue import Answer, Dialogue
from ultrafuser.server.terminal.pieces import Piece
from ultrafuser.server.terminal.screen import Screen, visible


def event(text: str | None = None, finish_reason: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason, **more}
    return f"data: {json.dumps({'id': 'c', 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


DONE = "data: [DONE]\n\n"
FAILURE = f"data: {json.dumps({'error': {'message': 'a specialist computed NaN', 'code': 'nonfinite_output'}})}\n\n"


class Script(ThreadingHTTPServer):
    """A server that answers what is written down: statuses, and the events of streams. Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: tuple[int, str] | None = None
        """What is answered when its models are asked for; else one of `specialists`."""

        self.specialists: list[str] | None = None
        self.answers: list[tuple[int, str]] = []
        self.asked: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Script

    def do_GET(self) -> None:
        card = {"id": "scripted", "object": "model"}
        if self.server.specialists:
            card["specialists"] = self.server.specialists  # type: ignore[assignment]
        own = self.server.models or (200, json.dumps({"object": "list", "data": [card]}))
        self._send(*own, "application/json")

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        status, body = self.server.answers.pop(0)
        self._send(status, body, "text/event-stream" if status == 200 else "application/json")

    def _send(self, status: int, body: str, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def script() -> Iterator[Script]:
    with Script() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def chat_with(script: Script) -> Chat:
    client = ChatClient(script.url, None, None)
    return Chat(client, Screen(client.specialists))


GOOD = (200, event("Yes") + event(", it is.") + event(finish_reason="stop") + DONE)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ((400, json.dumps({"error": {"message": "too\nlong", "code": "x"}})), "HTTP 400: too long"),
        ((404, "nothing here"), "HTTP 404: "),
        ((200, event("half an ") + FAILURE), "a specialist computed NaN"),
        ((200, event("half an ")), "the answer broke off"),
        ((200, event("half an ") + DONE), "the answer broke off"),
        ((200, event("half an ") + "data: {no JSON\n\n"), ""),
        ((200, event("half an ") + "data: [1]\n\n"), "what the server answers is no chat completion"),
        ((200, event(delta=None)), "what the server answers is no chat completion"),
    ],
)
def test_of_a_turn_that_fails_nothing_is_sent_with_the_next_one(
    script: Script, failure: tuple[int, str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere the message stayed in the history: two user turns in a row."""
    script.answers = [GOOD, failure, GOOD]
    chat = chat_with(script)
    assert chat.ask("first") == "stop"
    assert chat.ask("second") is None
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"ultrafuser: {reason}")
    assert line.endswith("; the message is not kept in the conversation")
    assert chat.ask("third") == "stop"
    assert [message["content"] for message in script.asked[-1]["messages"]] == ["first", "Yes, it is.", "third"]


@pytest.mark.parametrize("models", [(200, "<html>"), (200, "{}"), (200, "[]"), (200, '"x"'), (404, "nothing here")])
def test_an_address_that_is_no_api_is_one_line(script: Script, models: tuple[int, str]) -> None:
    script.models = models
    with pytest.raises(EndpointError, match=r"base_url: .* is no OpenAI API: it has no list of models; most .* /v1$"):
        chat_with(script)


def test_half_a_surrogate_pair_does_not_end_the_chat(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    """It could neither be shown, nor saved, nor sent with the next message."""
    script.answers = [(200, event("a\ud800b") + event(finish_reason="stop") + DONE), GOOD]
    chat = chat_with(script)
    assert [chat.ask("first"), chat.ask("second")] == ["stop", "stop"]
    assert capsys.readouterr().out == "a?b\nYes, it is.\n"
    assert script.asked[1]["messages"][1]["content"] == "a?b"


@pytest.mark.parametrize("status", [401, 500])
def test_nothing_that_a_server_says_of_a_failure_steers_the_terminal(script: Script, status: int) -> None:
    script.models = (status, json.dumps({"error": {"message": "no\x1b[2J\x07"}}))
    with pytest.raises(EndpointError) as told:
        ChatClient(script.url, None, None)
    assert f"HTTP {status}: no\ufffd[2J\ufffd" in str(told.value)
    script.models = (200, json.dumps({"object": "list", "data": [{"id": "a\x1b[2J"}]}))
    with pytest.raises(EndpointError, match=r"has no 'b'; it has a\ufffd\[2J$"):
        ChatClient(script.url, None, "b")


@pytest.mark.parametrize(
    ("piped", "status", "asked"), [(b"\xef\xbb\xbfcaf\xc3\xa9\r\n", 0, "café"), (b"caf\xe9\n", 2, None)]
)
def test_a_pipe_is_utf_8_whatever_the_locale(
    script: Script, piped: bytes, status: int, asked: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else it was a traceback in one locale, and in another a complaint about surrogates."""
    script.answers = [GOOD]
    (tmp_path / "message").write_bytes(piped)
    with (tmp_path / "message").open(encoding="ascii") as file, mock.patch.object(sys, "stdin", file):
        assert main(["chat", "--base-url", script.url]) == status
    assert [body["messages"][0]["content"] for body in script.asked] == ([asked] if asked else [])
    if asked is None:
        told = capsys.readouterr().err
        assert told == "ultrafuser: no message: standard input is not UTF-8 (byte 4); convert it\n"


def test_a_reader_who_has_enough_ends_the_answer(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ultrafuser chat < question | head -1` ended in a traceback."""
    script.answers = [GOOD]
    (tmp_path / "message").write_text("hello")
    reader, writer = os.pipe()
    os.close(reader)
    with (
        (tmp_path / "message").open() as own,
        os.fdopen(writer, "w") as pipe,
        mock.patch.multiple(sys, stdin=own, stdout=pipe),
    ):
        assert main(["chat", "--base-url", script.url]) == 1
    assert capsys.readouterr().err == ""


def test_before_there_is_an_answer_nothing_is_saved(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be a row without messages, which training refuses."""
    chat_with(script)._take(f"/save {tmp_path / 'chat.jsonl'}")
    assert capsys.readouterr().err == "/save: there is no answer yet\n"
    assert list(tmp_path.iterdir()) == []


def test_an_empty_answer_is_told_of_and_leaves_nothing_behind(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    """There was an empty line, and the message was gone without a word."""
    script.answers = [(200, event(finish_reason="stop") + DONE), GOOD]
    chat = chat_with(script)
    chat.ask("first")
    assert capsys.readouterr().err == "the answer is empty; the message is not kept in the conversation\n"
    chat.ask("second")
    assert [message["content"] for message in script.asked[-1]["messages"]] == ["second"]


def test_a_server_of_another_kind_is_asked_for_no_marks(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenAI's own would refuse fields that it does not know."""
    script.answers = [GOOD]
    chat = chat_with(script)
    chat.ask("hello")
    assert script.asked[0].keys() == {"model", "messages", "stream"}
    chat._take("/weights")
    told = capsys.readouterr()
    assert (told.out, told.err) == ("Yes, it is.\n", "this server tells no weights\n")


def test_a_thought_is_no_part_of_the_answer(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    script.specialists = ["text", "code"]

    def marks(name: str, *weights: float) -> dict[str, Any]:
        entry = {"token": name, "logprob": 0.0, "bytes": None, "top_logprobs": []}
        return {"logprobs": {"content": [entry]}, "gate_weights": {"content": [list(weights)]}}

    thought = event(delta={"reasoning": "Yes? "}, **marks("Yes", 0.9, 0.1))
    script.answers = [(200, thought + event("Yes", **marks("Yes", 0.2, 0.8)) + event(finish_reason="stop")), GOOD]
    chat = chat_with(script)
    chat.ask("hello")
    chat.ask("again")
    assert script.asked[0]["gate_weights"] is script.asked[0]["logprobs"] is True
    assert capsys.readouterr().out == "Yes? Yes\nYes, it is.\n"
    assert script.asked[1]["messages"][1] == {"role": "assistant", "content": "Yes"}


def test_nothing_of_an_answer_steers_the_terminal() -> None:
    assert visible("a\x1b[2Jb\x07\r\x9b\u202ec\td\n") == "a␛[2Jb␇␍\ufffd\ufffdc\td\n"


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.jsonl.gz"])
def test_what_is_saved_is_a_row_of_training_data(name: str, tmp_path: Path) -> None:
    dialogue = Dialogue("Be brief.", [("hello", Answer([Piece("Hi", (0.5, 0.5)), Piece("", None)], "stop"))])
    path = tmp_path / name
    write_json_lines(path, [dialogue.as_json("tiny", ["text", "code"])])
    ((_, row, _),) = read_conversations(DataFile(path, "chat"))
    assert isinstance(row, Conversation)
    assert row.messages == dialogue.messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({}, None),
        ({"OPENAI_API_KEY": "o"}, "o"),
        ({"ULTRAFUSER_API_KEY": "a, b", "OPENAI_API_KEY": "o"}, "a"),
        ({"ULTRAFUSER_API_KEY": "", "OPENAI_API_KEY": "o"}, "o"),
    ],
)
def test_the_key_is_the_servers_own_or_the_official_clients(environ: dict[str, str], key: str | None) -> None:
    assert _key_of(environ) == key
