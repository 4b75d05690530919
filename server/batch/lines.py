"""The two files of a batch, line by line, in OpenAI's batch format: requests, and what became of them. Asks nobody.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}},
     "error": null}

A line that is no request never reaches the routes: its `response` is null, and `error` has a code and a message.
"""

import fcntl
import io
import json
import os
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ultrafuser.gating.commands.run_folder import append_line
from ultrafuser.gating.errors import CommandError, DataError
from ultrafuser.gating.files import put_in_place, read_lines
from ultrafuser.gating.json_text import JsonError, parse_json

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""The routes that generate."""


@dataclass(frozen=True)
class BatchRequest:
    """One line of the input."""

    custom_id: str | None
    """Says whose answer is whose; None where the line is no JSON."""

    url: str = ""
    body: bytes = b""
    """JSON, as it is sent to the route."""

    problem: tuple[str, str] | None = None
    """Code and message of what is wrong with the line; such a one is not sent."""


def custom_ids(path: Path) -> tuple[frozenset[str], int]:
    """The ids of all requests of a file, and the number of its lines, those without JSON included.

    Raises:
        DataError: an id is missing or there twice, the file cannot be read, or has no line.
    """
    lines: dict[str, int] = {}
    count = 0
    for number, text, _ in read_lines(path):
        count += 1
        try:
            line = _object(text)
        except JsonError:
            continue  # told as the answer to this line
        name = line.get("custom_id")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path.name}:{number}: custom_id: missing; give each line a text of its own")
        if name in lines:
            raise DataError(
                f"{path.name}:{number}: custom_id: {name!r:.100} is line {lines[name]}'s; give each its own"
            )
        lines[name] = number
    if not count:
        raise DataError(f"{path.name}: has no line; give one request a line")
    return frozenset(lines), count


def read_requests(path: Path, done: Collection[str]) -> Iterator[BatchRequest]:
    """The requests of a file, but for those that are done.

    Raises:
        DataError: the file cannot be read.
    """
    for number, text, _ in read_lines(path):
        try:
            line = _object(text)
        except JsonError as error:
            yield BatchRequest(None, problem=("invalid_json_line", f"line {number}: {error}"))
            continue
        name = line.get("custom_id")
        if name not in done:
            yield _request(name, line)


def _object(text: bytes) -> dict[str, Any]:
    line = parse_json(text)
    if not isinstance(line, dict):
        raise JsonError("not a JSON object")
    return line


def _request(name: Any, line: dict[str, Any]) -> BatchRequest:
    method, url, body = line.get("method"), line.get("url"), line.get("body")
    if method != "POST":
        return BatchRequest(name, problem=("invalid_method", f"method: {method!r:.100}; give POST"))
    if url not in URLS:
        return BatchRequest(name, problem=("invalid_url", f"url: {url!r:.100}; give one of {', '.join(URLS)}"))
    if not isinstance(body, dict):
        return BatchRequest(name, problem=("invalid_body", "body: not a JSON object; give the request's fields"))
    if body.get("stream"):
        return BatchRequest(name, problem=("invalid_body", "stream: true; a batch has whole answers, leave it out"))
    return BatchRequest(name, url, json.dumps(body).encode())


def answered(request: BatchRequest, status: int, request_id: str, body: Any) -> dict[str, Any]:
    """The line of a request that a route has answered, with an answer or a refusal."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": _new_id(), "custom_id": request.custom_id, "response": response, "error": None}


def not_sent(request: BatchRequest) -> dict[str, Any]:
    """The line of a request with a problem."""
    assert request.problem is not None
    code, message = request.problem
    error = {"code": code, "message": message}
    return {"id": _new_id(), "custom_id": request.custom_id, "response": None, "error": error}


def _new_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def is_success(response: Any, error: Any) -> bool:
    """Whether a line has an answer: the status decides, not that there is a body."""
    return error is None and isinstance(response, dict) and response.get("status_code") == 200


@contextmanager
def sole_output(path: Path, known: Collection[str], *, resumes: bool) -> Iterator[tuple["Output", frozenset[str]]]:
    """The output, for this run alone, and the ids of the requests that it has an answer to already.

    Lines that failed are taken out when a run goes on: they are tried again. `known` are the input's ids.

    Raises:
        CommandError: the file is there and this run does not go on, is another batch's, or cannot be written; or
            another run writes to it.
    """
    if path.suffix == ".gz":
        raise CommandError(f"output: {path}: answers are written as plain lines; name a file without .gz")
    with _opened(path, "ab", path) as file:
        _lock(file, path)
        if not path.stat().st_size:
            yield Output(path, file), frozenset()
            return
        if not resumes:
            raise CommandError(f"output: {path} is there already; add --resume to go on, or name another file")
        place = path.resolve()  # a link stays one
        partial = place.with_name(f"{place.name}.partial")
        with _opened(partial, "wb", path) as kept:
            try:
                _lock(kept, path)
                done = _keep_answers(path, kept, known)
                os.fsync(kept.fileno())
                put_in_place(partial, place)
            except OSError as error:
                raise _unwritten(path, error) from error
            finally:
                partial.unlink(missing_ok=True)
            yield Output(path, kept), done


def _opened(path: Path, mode: Literal["ab", "wb"], output: Path) -> io.FileIO:
    try:
        return path.open(mode, buffering=0)
    except OSError as error:
        beside = "" if path == output else f", as {path.name} beside it cannot"
        raise CommandError(
            f"output: {output}: cannot be written{beside} ({error.strerror}); name another file"
        ) from error


def _unwritten(path: Path, error: OSError) -> CommandError:
    return CommandError(f"output: {path}: cannot be written ({error.strerror}); make room, then --resume goes on")


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CommandError(f"output: another run writes to {path}; wait for it, or name another file") from error


def _keep_answers(path: Path, kept: BinaryIO, known: Collection[str]) -> frozenset[str]:
    """Copy the lines that have an answer; their ids. A last line without its end was cut off when a run was killed."""
    done = set()
    with path.open("rb") as lines:
        for number, text in enumerate(lines, start=1):
            if not text.endswith(b"\n"):
                break
            try:
                line = json.loads(text)
                name, is_good = line["custom_id"], is_success(line["response"], line["error"])
                is_known = name is None or name in known
            except (ValueError, LookupError, TypeError) as error:
                raise CommandError(f"output: {path}:{number}: not of a batch's output; name another file") from error
            if not is_known:
                raise CommandError(
                    f"output: {path}:{number}: {name!r:.100} is not in the input; name this input's output"
                )
            if is_good:
                append_line(kept.fileno(), text.decode().removesuffix("\n"))
                done.add(name)
    return frozenset(done)


class Output:
    """The file of answers: each of its lines is there whole, and outlives this process, once it is written."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file

    def write(self, line: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            CommandError: it could not be written; a part of it may have been.
        """
        try:
            append_line(self._file.fileno(), json.dumps(line, ensure_ascii=False))
        except OSError as error:
            raise _unwritten(self._path, error) from error
