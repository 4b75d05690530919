"""Log lines carry the request's id and never what a client has written; the start shows its steps."""

import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import datetime

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.tool_parsers import ToolParserManager

from tests.fakes import build_tokenizer
from ultrafuser.server.log import (
    CONFIGURED_LOGGERS,
    LogFormat,
    LogStream,
    adopt_vllm_logging,
    configure_logging,
    request_id,
)
from ultrafuser.server.start.progress import StartupProgress


@pytest.fixture
def log_format() -> LogFormat:
    """A test changes it by parametrising."""
    return "text"


@pytest.fixture
def lines(log_format: LogFormat) -> Iterator[io.StringIO]:
    """Logging at info, into a text of its own."""
    stream = io.StringIO()
    vllm = logging.getLogger("vllm")
    before = (list(vllm.handlers), vllm.propagate)
    configure_logging("info", log_format, stream)
    adopt_vllm_logging()
    yield stream
    for name in CONFIGURED_LOGGERS:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    vllm.handlers, vllm.propagate = before


def test_each_line_names_the_request(lines: io.StringIO) -> None:
    token = request_id.set("request-7")
    logging.getLogger("ultrafuser.server.somewhere").info("working")
    request_id.reset(token)
    logging.getLogger("ultrafuser.server.somewhere").info("idle")
    first, second = lines.getvalue().splitlines()
    assert "[request-7] ultrafuser.server.somewhere: working" in first
    assert "[-] ultrafuser.server.somewhere: idle" in second


@pytest.mark.parametrize("log_format", ["json"])
def test_as_json_every_line_is_one_object(lines: io.StringIO) -> None:
    token = request_id.set("request-7")
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError:
        logging.getLogger("ultrafuser.server.somewhere").exception('it says "no"\nand more')
    request_id.reset(token)
    with StartupProgress(1, LogStream()).step("only"):
        pass
    failed, begun, done = (json.loads(line) for line in lines.getvalue().splitlines())
    assert datetime.fromisoformat(failed.pop("time")).tzinfo is not None
    assert "RuntimeError: two\nlines" in failed.pop("exception")
    message = 'it says "no"\nand more'
    assert failed == {
        "level": "error",
        "logger": "ultrafuser.server.somewhere",
        "request_id": "request-7",
        "message": message,
    }
    assert (begun["message"], begun["request_id"]) == ("[1/1] only ...", None)
    assert done["message"].startswith("[1/1] only: ")


def test_levels_below_the_chosen_one_are_not_shown(lines: io.StringIO) -> None:
    logging.getLogger("ultrafuser.server").debug("details")
    assert lines.getvalue() == ""


def test_a_clients_fault_leaves_no_traceback_of_vllm(lines: io.StringIO) -> None:
    logger = logging.getLogger("vllm.somewhere")
    for error in (VLLMValidationError("temperature is wrong"), RuntimeError("the engine is wrong")):
        try:
            raise error
        except Exception:
            logger.exception("Error in stream generator")
    assert "temperature" not in lines.getvalue()
    assert "the engine is wrong" in lines.getvalue()


def test_the_steps_of_the_start_are_numbered_and_timed() -> None:
    stream = io.StringIO()
    progress = StartupProgress(2, stream)
    with progress.step("first"):
        progress.report("unpacking", 0.0)
        progress.report("unpacking", 0.5)
    with progress.step("second"):
        pass
    text = re.sub(r"\d+\.\d s", "T", stream.getvalue())
    assert text == "[1/2] first ...\n      unpacking\n[1/2] first: T\n[2/2] second ...\n[2/2] second: T\n"


def test_a_step_that_fails_is_not_reported_as_done() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="broken"), StartupProgress(1, stream).step("only"):
        raise ValueError("broken")
    assert stream.getvalue() == "[1/1] only ...\n"


class Terminal(io.StringIO):
    """A text that says it is a terminal."""

    def isatty(self) -> bool:
        """Always."""
        return True


def test_on_a_terminal_a_finished_step_leaves_one_line() -> None:
    stream = Terminal()
    with StartupProgress(1, stream).step("only"):
        pass
    assert stream.getvalue().split("\r\033[K")[-1].startswith("[1/1] only: ")


def test_a_tool_call_that_is_no_json_is_not_told(lines: io.StringIO) -> None:
    """vLLM logs a traceback of what the model has written, as if the server had failed."""
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], tools=tools)
    parser = ToolParserManager.get_tool_parser("hermes")(build_tokenizer(320, 320, "text"))
    found = parser.extract_tool_calls("<tool_call>\n{no JSON}\n</tool_call>", request)
    assert not found.tools_called
    assert lines.getvalue() == ""
