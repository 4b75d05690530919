"""Logging, configured once: one handler on stderr, the request's id on each line, as text or as JSON."""

import io
import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Id of the request being served; "-" outside of any."""

_FORMAT = "%(asctime)s %(levelname)-7s [%(request_id)s] %(name)s: %(message)s"
CONFIGURED_LOGGERS = ("ultrafuser", "uvicorn")
"""The loggers that get our handler; their children inherit it."""

_CLIENT_ERRORS = frozenset({"InvalidRequest", "VLLMClientError"})


def _with_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True


class _JsonLines(logging.Formatter):
    """One JSON object a line, whatever is in the message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, str | None] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": None if (own := request_id.get()) == "-" else own,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class LogStream(io.StringIO):
    """A text stream each of whose lines becomes a log line: for what would be printed, where all must be JSON."""

    def write(self, text: str) -> int:
        """Log each line; the length of all, as a stream answers."""
        for line in text.splitlines():
            logging.getLogger(__name__).info("%s", line.strip())
        return len(text)


def _no_client_traceback(record: logging.LogRecord) -> bool:
    """Drops what vLLM logs, traceback and all, when a client's fault shows only after the response has begun."""
    error = record.exc_info[1] if record.exc_info else None
    return not {base.__name__ for base in type(error).__mro__} & _CLIENT_ERRORS


def configure_logging(level: str, log_format: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Send our log lines of at least this level to stderr; uvicorn's only from warnings on."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines() if log_format == "json" else logging.Formatter(_FORMAT))
    handler.addFilter(_with_request_id)
    for name in CONFIGURED_LOGGERS:
        _adopt(name, handler, "WARNING" if name == "uvicorn" else level.upper())


def adopt_vllm_logging() -> None:
    """Give this process's vLLM lines our format; call it after vLLM is imported. Its other processes keep theirs."""
    (handler,) = logging.getLogger(CONFIGURED_LOGGERS[0]).handlers
    handler.addFilter(_no_client_traceback)
    _adopt("vllm", handler, logging.getLogger("vllm").level)
    # A model that writes no JSON in a tool call is no fault of the server's, and what it wrote is the client's own.
    logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)


def _adopt(name: str, handler: logging.Handler, level: str | int) -> None:
    logger = logging.getLogger(name)
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
