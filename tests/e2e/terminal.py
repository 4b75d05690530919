"""A program in a terminal: a pseudo-terminal of its own, which is its controlling one, so that Ctrl-C signals it."""

import codecs
import os
import pty
import re
import signal
import struct
import termios
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fcntl import ioctl

from tests.e2e.process import clean_environment, wait_for

ROWS, COLUMNS = 40, 200
CTRL_C, CTRL_D, ENTER, UP, ALT_ENTER = "\x03", "\x04", "\r", "\x1b[A", "\x1b\r"
_CONTROLS = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\].*?(\x07|\x1b\\)|[@-Z\\^_=>])")


def pasted(text: str) -> str:
    """What a terminal sends for a text from the clipboard: the ends of its lines as those of a keyboard."""
    return "\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~"


class Terminal:
    """A command in a terminal until its end."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
        # A prompt that asks where its cursor is would wait for an answer; there is no screen here.
        own = clean_environment() | {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"} | dict(environ or {})
        own = {name: value for name, value in own.items() if value}
        self.pid, self._master = pty.fork()
        if not self.pid:
            try:
                os.execvpe(command[0], list(command), own)
            finally:
                os._exit(127)
        ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.raw = ""
        self._status: int | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self._reader.join()
        os.close(self._master)

    @property
    def shown(self) -> str:
        """All that was written so far, without what steers the terminal."""
        return plain(self.raw)

    def type(self, keys: str) -> None:
        """Send these keys."""
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, after: int = 0, seconds: float = 120) -> int:
        """Wait until a text is shown, behind this place; returns the place behind it."""

        def end() -> int:
            begin = self.shown.find(text, after)
            assert begin >= 0 or self._reader.is_alive(), self.shown[after:]
            return begin + len(text) if begin >= 0 else 0

        return wait_for(end, f"{text!r} in the terminal", seconds)

    def wait_for_prompt(self, prompt: str, after: int = 0, seconds: float = 120) -> None:
        """Wait until the last thing shown, behind this place, is a line with a prompt alone."""

        def is_there() -> bool:
            assert self._reader.is_alive(), self.shown[after:]
            return self.shown[after:].rstrip(" ").endswith(f"\n{prompt}")

        wait_for(is_there, "a prompt in the terminal", seconds)

    def wait_until_it_ends(self) -> int:
        """The exit status."""
        _, status = os.waitpid(self.pid, 0)
        self._status = os.waitstatus_to_exitcode(status)
        self._reader.join()
        return self._status

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with suppress(OSError):  # Linux' word for the end
            while data := os.read(self._master, 65536):
                self.raw += decoder.decode(data)


def plain(text: str) -> str:
    """A text without what steers the terminal."""
    return _CONTROLS.sub("", text).translate(dict.fromkeys(map(ord, "\r\b")))
