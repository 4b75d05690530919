"""Runs a program that a model wrote, and its tests, in a process that is limited and killed.

What it is: a Python of its own (`-I -S`: no site packages, no environment variables) in an empty folder that is removed
afterwards, without standard input and output, with limits on memory, CPU time, file size and processes, killed with
all its children at a wall-clock limit; and, where the kernel lets a user have them, in network and process
namespaces of its own, so that it reaches no network and none of its children outlives it. Started by root it runs as
nobody, who may read everything if this Python lies where nobody could not read it.

What it is not: a security boundary against a determined attacker. Started by another user it runs as that user, and
can read, and write, every file that this user can. Without namespaces it reaches the network too. Run an evaluation
that executes code in a container or a machine made for it.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

_CHILD = Path(__file__).with_name("sandboxed.py")
_POLL_SECONDS = 0.01
_MAX_REPORT_BYTES = 4096


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    wall_seconds: float = 10.0
    """From start to end, the start of Python included."""

    memory_bytes: int = 1024**3
    """Address space of a process."""

    file_bytes: int = 16 * 1024**2
    """Size of a file it writes."""


def run_tests(program: str, tests: str, limits: Limits | None = None) -> str | None:
    """Run a program, then its tests, which can use its names.

    Returns:
        None if the tests ran to their end without an exception, else why not, in a few words. Ending early, by
        `sys.exit` and `os._exit` too, is a failure: a secret word is reported after the tests and nowhere else.
    """
    limits = limits or Limits()
    secret = secrets.token_hex(16)
    with TemporaryDirectory(prefix="ultrafuser-sandbox-", ignore_cleanup_errors=True) as folder:
        task = {"program": program, "tests": tests, "secret": secret, "limits": asdict(limits)}
        (Path(folder) / "task.json").write_text(json.dumps(task), encoding="utf-8")
        in_time, report = _run(folder, limits.wall_seconds)
    word, _, reason = report.partition(" ")
    if word == secret:
        return reason or None
    return "ended before its tests did" if in_time else f"took more than {limits.wall_seconds:g} s"


def _run(folder: str, seconds: float) -> tuple[bool, str]:
    """Whether the process ended by itself, and what it reported."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CHILD), str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writer],
            cwd=folder,
            env={},
            start_new_session=True,
        )
    finally:
        os.close(writer)
    try:
        in_time = _ends_within(process.pid, seconds)
    finally:
        # Before the process is waited for: until then nothing else can have its number.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    try:
        return in_time, os.read(reader, _MAX_REPORT_BYTES).decode(errors="replace")
    except BlockingIOError:  # a child that got away holds the other end
        return in_time, ""
    finally:
        os.close(reader)


def _ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
