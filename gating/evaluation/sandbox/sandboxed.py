"""The other side of `sandbox.py`: started as a program in an empty folder, limits itself, runs a task, reports.

Three processes: two wait, the second of them as the first of its namespace, and the third runs what the model wrote.
Only the standard library: it is started without site packages.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import types
from typing import Any, NoReturn

_NEW_USER, _NEW_IPC, _NEW_NETWORK, _NEW_PIDS = 0x10000000, 0x08000000, 0x40000000, 0x20000000
_SET_PARENT_DEATH_SIGNAL, _KEEP_CAPABILITIES = 1, 8
_CAPABILITY_VERSION, _READ_EVERYTHING = 0x20080522, 1 << 2
_LIBC = ctypes.CDLL(None)
_NOBODY = 65534
_MAX_REASON = 200


def main() -> None:
    """Run the task of this folder; its report goes to the file descriptor that is the only argument."""
    writer = int(sys.argv[1])
    with open("task.json", encoding="utf-8") as file:
        task = json.load(file)
    os.remove("task.json")
    _leave()
    _die_with_parent()
    signal.alarm(int(task["limits"]["wall_seconds"]) + 5)  # should the evaluation itself be gone
    # The first process of a namespace cannot be killed from within, so it only waits; all others end with it.
    _wait_for_child()
    _wait_for_child()
    _limit(task["limits"])
    _run(task, writer)


def _wait_for_child() -> None:
    """Go on in a child; this process waits for it and ends."""
    child = os.fork()
    if child != 0:
        os.waitpid(child, 0)
        os._exit(0)
    _die_with_parent()


def _run(task: dict[str, Any], writer: int) -> NoReturn:
    """Program, then tests, in a module of their own; not `__main__`, so that examples at the end do not run."""
    own = os.getpid()
    module = types.ModuleType("program")
    sys.modules["program"] = module
    reason = ""
    try:
        exec(compile(task["program"], "program", "exec"), module.__dict__)
        exec(compile(task["tests"], "tests", "exec"), module.__dict__)
    except BaseException as error:  # whatever it is, SystemExit too, the tests have not passed
        reason = type(error).__name__
        if text := str(error):
            reason += f": {text[:_MAX_REASON]}"
    if os.getpid() == own:  # not what it has forked
        os.write(writer, f"{task['secret']} {reason}".encode(errors="replace"))
    os._exit(0)


def _limit(limits: dict[str, Any]) -> None:
    cpu_seconds = int(limits["wall_seconds"]) + 1
    for kind, most in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),  # neither processes nor threads
    ):
        resource.setrlimit(kind, (most, most))


def _leave() -> None:
    """Leave root, and the machine's network, processes and shared memory, as far as the kernel permits it."""
    apart = _NEW_NETWORK | _NEW_PIDS | _NEW_IPC
    is_apart = _LIBC.unshare(apart) == 0
    capabilities = _leave_root() if os.geteuid() == 0 else 0
    if not is_apart and not capabilities:  # a user namespace would take them away
        _LIBC.unshare(_NEW_USER | apart)


def _leave_root() -> int:
    """Become nobody: the kernel holds root to no number of processes, and root may write everywhere.

    Returns the capabilities that were kept: to read every file, where nobody could not read Python's own; every import
    would fail. Where even that cannot be kept, root stays root.
    """
    kept = 0 if _nobody_reads_python() else _READ_EVERYTHING
    with open("/proc/self/status") as status:
        permitted = next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm"))
    if kept & ~permitted:
        return kept
    os.chown(".", _NOBODY, _NOBODY)
    _LIBC.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    # Effective, permitted, inheritable; then the same of capabilities above 31.
    if _LIBC.capset(header, (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)) != 0:
        os._exit(1)
    return kept


def _nobody_reads_python() -> bool:
    os.setegid(_NOBODY)
    os.seteuid(_NOBODY)
    try:
        with open(os.__file__, "rb"):
            return True
    except OSError:
        return False
    finally:
        os.seteuid(0)
        os.setegid(0)


def _die_with_parent() -> None:
    _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    main()
