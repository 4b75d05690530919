"""Programs are really run here: right and wrong ones, and such as would rather not be tested or never end."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from ultrafuser.gating.evaluation.sandbox.sandbox import Limits, run_tests

QUICK = Limits(wall_seconds=2.0)


def processes_with(word: str) -> list[psutil.Process]:
    """Living processes whose arguments hold a word."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if word in " ".join(process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_a_right_program_passes():
    assert run_tests("def double(x):\n    return 2 * x\n", "assert double(4) == 8\n") is None


def test_a_wrong_program_fails_with_the_tests_own_words():
    reason = run_tests("def double(x):\n    return x\n", "assert double(4) == 8, 'not eight'\n")
    assert reason == "AssertionError: not eight"


def test_a_program_that_is_no_python_fails():
    assert "SyntaxError" in str(run_tests("def double(x:\n", "assert True\n"))


def test_an_endless_loop_is_ended_in_time():
    start = time.monotonic()
    assert run_tests("while True:\n    pass\n", "assert True\n", Limits(wall_seconds=1.0)) == "took more than 1 s"
    assert time.monotonic() - start < 5


def test_a_program_that_wants_too_much_memory_fails():
    assert run_tests("held = bytearray(3 * 1024**3)\n", "assert True\n") == "MemoryError"


@pytest.mark.parametrize(
    "end",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os, signal; os.kill(os.getpid(), 9)",
    ],
)
def test_a_program_that_ends_before_its_tests_has_not_passed(end):
    assert run_tests(f"def double(x):\n    return 2 * x\n{end}\n", "assert double(4) == 8\n", QUICK) is not None


def test_a_function_that_ends_the_program_within_its_test_has_not_passed():
    assert run_tests("import os\ndef f():\n    os._exit(0)\n", "f()\n", QUICK) == "ended before its tests did"


def test_writing_to_every_open_file_does_not_make_a_pass():
    program = """
import os
for number in range(64):
    try:
        os.write(number, b"passed ")
    except OSError:
        pass
os._exit(0)
"""
    assert run_tests(program, "assert False\n", QUICK) is not None


def test_processes_that_a_program_starts_do_not_outlive_it():
    word = f"ultrafuser-child-{time.monotonic_ns()}"
    program = f"""
import os, sys
for _ in range(3):
    try:
        if os.fork() == 0:
            os.setsid()
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(30)", "{word}"])
    except OSError:
        break
import time
time.sleep(30)
"""
    start = time.monotonic()
    assert run_tests(program, "assert True\n", QUICK) is not None
    assert time.monotonic() - start < 8
    deadline = time.monotonic() + 3
    while processes_with(word) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(word) == []


def test_a_program_that_forks_without_end_is_stopped():
    before = len(psutil.pids())
    assert run_tests("import os\nwhile True:\n    os.fork()\n", "assert True\n", QUICK) is not None
    time.sleep(0.2)
    assert len(psutil.pids()) < before + 100


def test_a_program_sees_no_environment_and_an_empty_folder(monkeypatch):
    monkeypatch.setenv("ULTRAFUSER_TEST_WORD", "secret")
    program = "import os\nvariables, files = dict(os.environ), os.listdir('.')\n"
    assert run_tests(program, "assert 'ULTRAFUSER_TEST_WORD' not in variables\nassert files == []\n") is None


def test_a_program_has_no_input_and_its_output_goes_nowhere(capfd):
    assert (
        run_tests("print('x' * 10**6)\n", "try:\n    input()\nexcept EOFError:\n    pass\nelse:\n    assert False\n")
        is None
    )
    assert capfd.readouterr().out == ""


def test_a_file_that_grows_too_large_is_an_error():
    program = """
def write():
    with open("large", "wb") as file:
        for _ in range(64):
            file.write(bytes(1024**2))
"""
    assert "File too large" in str(run_tests(program, "write()\n"))


def test_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_tests("open('note', 'w').write('x')\n", "import os\nassert os.listdir('.') == ['note']\n") is None
    assert list(tmp_path.iterdir()) == []


def may_have_namespaces() -> bool:
    """Whether the kernel lets this user leave the machine's network; asked in a process of its own."""
    flags = 0x40000000 if os.geteuid() == 0 else 0x50000000
    script = f"import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare({flags}) != 0)"
    return subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.skipif(not may_have_namespaces(), reason="the kernel gives this user no namespaces")
def test_a_program_reaches_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)\n"
        assert "OSError" in str(run_tests(program, "assert True\n", QUICK))
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has something to give up")
def test_a_program_that_root_starts_cannot_write_roots_files(tmp_path):
    target = tmp_path / "file"
    target.write_text("mine")
    assert "PermissionError" in str(run_tests(f"open({str(target)!r}, 'w')\n", "assert True\n"))
    assert Path(target).read_text() == "mine"


def test_example_calls_at_the_end_of_a_program_do_not_run():
    program = "def f():\n    return 1\n\nif __name__ == '__main__':\n    raise SystemExit\n"
    assert run_tests(program, "assert f() == 1\n") is None
