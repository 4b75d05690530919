"""The scripts of deploy/, run as a container or a release would run them, with stand-ins for what is not here."""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.container.page import CHAPTERS, blocks, to_run

DEPLOY = Path(__file__).parent.parent.parent / "deploy"


def program(folder: Path, name: str, script: str) -> None:
    """A command of this name in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


class Container:
    """The entrypoint, with folders for its volumes and commands that say how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("ultrafuser", "python"):
            program(folder / "bin", name, f'echo {name} "$@"; env >&2; exit 7')
        program(folder / "bin", "nproc", "echo ${OMP_NUM_THREADS:-16}")
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder / "cache"),
            "HF_HOME": str(folder / "models" / "huggingface"),
            "ULTRAFUSER_CACHE": str(folder / "models" / "ultrafuser"),
            "ENTRYPOINT_CGROUP": str(folder / "cgroup"),
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Start it with these arguments."""
        command = [str(DEPLOY / "entrypoint.sh"), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=20)

    def started_with(self) -> dict[str, str]:
        """The environment of the command that it starts."""
        return dict(line.split("=", 1) for line in self.run().stderr.splitlines())


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], "ultrafuser serve"),
        (["--max-num-seqs", "64"], "ultrafuser serve --max-num-seqs 64"),
        (["serve", "/fusion/my fusion.yaml"], "ultrafuser serve /fusion/my fusion.yaml"),
        (["python", "-V"], "python -V"),
    ],
)
def test_a_container_serves_unless_it_is_told_otherwise(
    container: Container, arguments: list[str], command: str
) -> None:
    done = container.run(*arguments)
    assert done.stdout == f"{command}\n"
    assert done.returncode == 7


def test_an_image_offers_no_command_whose_packages_it_lacks(container: Container) -> None:
    done = container.run("train", "--help")
    assert done.returncode == 127
    assert done.stdout == ""


def test_volumes_are_given_the_folders_that_are_written_to(container: Container) -> None:
    container.run()
    assert (container.folder / "models" / "ultrafuser").is_dir()
    assert (container.folder / "models" / "huggingface").is_dir()


def test_a_user_without_a_name_gets_one(container: Container) -> None:
    assert container.started_with()["USER"] == "ultrafuser"


def test_group_0_may_write_what_a_start_makes_on_the_volumes(container: Container) -> None:
    """Folders were 0755: a platform that gives the next container another user could not write into them."""
    program(container.folder / "bin", "ultrafuser", "mkdir $HOME/compiled && touch $HOME/compiled/code")
    assert container.run().returncode == 0
    made = [container.folder / "models" / "ultrafuser", *(container.folder / "cache").rglob("*")]
    assert len(made) == 3
    assert [path for path in made if not path.stat().st_mode & 0o020] == []


QUOTAS = {
    "cgroup 2: 2 of 16 cores": ({"cpu.max": "200000 100000"}, "2"),
    "cgroup 2: less than one": ({"cpu.max": "50000 100000"}, "1"),
    "cgroup 2: two and a half": ({"cpu.max": "250000 100000"}, "2"),
    "cgroup 2: all": ({"cpu.max": "max 100000"}, None),
    "cgroup 2: more than there are": ({"cpu.max": "6400000 100000"}, None),
    "cgroup 1: 3 of 16 cores": ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, "3"),
    "cgroup 1: all": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "none": ({}, None),
}


@pytest.mark.parametrize(("files", "threads"), QUOTAS.values(), ids=QUOTAS)
def test_as_many_threads_are_started_as_the_quota_pays_for(
    container: Container, files: dict[str, str], threads: str | None
) -> None:
    """vLLM counts cores, and a quota hides none: 2 cores' time was shared by a thread for each of the machine's."""
    for name, content in files.items():
        (container.folder / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (container.folder / "cgroup" / name).write_text(content + "\n")
    environment = container.started_with()
    assert environment.get("OMP_NUM_THREADS") == threads
    assert environment.get("VLLM_CPU_OMP_THREADS_BIND") == (threads and "nobind")


def test_threads_that_are_set_by_hand_stay(container: Container) -> None:
    (container.folder / "cgroup").mkdir()
    (container.folder / "cgroup" / "cpu.max").write_text("200000 100000\n")
    container.environment |= {"OMP_NUM_THREADS": "5", "VLLM_CPU_OMP_THREADS_BIND": "0-4"}
    environment = container.started_with()
    assert (environment["OMP_NUM_THREADS"], environment["VLLM_CPU_OMP_THREADS_BIND"]) == ("5", "0-4")


def test_a_number_of_threads_that_is_set_by_hand_is_not_overruled_by_binding(container: Container) -> None:
    """With OMP_NUM_THREADS set nproc says that number, so nothing was done, and vLLM bound a thread to every core."""
    (container.folder / "cgroup").mkdir()
    (container.folder / "cgroup" / "cpu.max").write_text("200000 100000\n")
    container.environment["OMP_NUM_THREADS"] = "1"
    environment = container.started_with()
    assert (environment["OMP_NUM_THREADS"], environment["VLLM_CPU_OMP_THREADS_BIND"]) == ("1", "nobind")


@pytest.mark.parametrize("name", ["HOME", "HF_HOME", "ULTRAFUSER_CACHE"])
def test_a_volume_that_cannot_be_written_to_is_named(container: Container, name: str) -> None:
    (container.folder / "file").touch()
    container.environment[name] = str(container.folder / "file" / "below")
    done = container.run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"entrypoint: {name}: user {os.getuid()}, group {os.getgid()} cannot write to ")
    assert done.stderr.count("\n") == 1


class Probes(BaseHTTPRequestHandler):
    """Alive, but not ready."""

    def do_GET(self) -> None:
        """Answer a probe."""
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()
        self.wfile.write(b'{"status":"alive"}' if self.path == "/health" else b'{"status":"shutting down"}')

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    """A server that answers probes."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Probes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "status", "answer"),
    [("/health", 0, '{"status":"alive"}\n'), ("/ready", 1, '503: {"status":"shutting down"}\n')],
)
def test_the_healthcheck_says_what_the_probe_says(port: int, path: str, status: int, answer: str) -> None:
    done = healthcheck(path, port)
    assert (done.returncode, done.stdout) == (status, answer)


def test_the_healthcheck_asks_no_proxy(port: int) -> None:
    """A proxy in Docker's configuration is given to every container, and cannot reach what listens in this one."""
    done = healthcheck("/health", port, http_proxy="http://127.0.0.1:1", HTTP_PROXY="http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (0, '{"status":"alive"}\n')


def test_the_healthcheck_fails_where_nobody_answers() -> None:
    done = healthcheck("/health", 1)
    assert done.returncode == 1
    assert "refused" in done.stdout
    assert done.stderr == ""


def healthcheck(path: str, port: int, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "ULTRAFUSER_PORT": str(port), **variables}
    command = [str(DEPLOY / "healthcheck.py"), path]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)


def test_the_commands_of_operations_find_their_files_in_order(tmp_path: Path) -> None:
    """The second block once named its files from another folder than the first one ends in."""
    private = shutil.ignore_patterns(".env", "secrets", "fusion", "__pycache__")
    shutil.copytree(DEPLOY, tmp_path / "checkout" / "deploy", ignore=private)
    for name in ("curl", "docker", "git", "kubectl", "openssl"):
        program(
            tmp_path / "bin", name, f'for word; do echo "$PWD/${{word##*=}}" >>{tmp_path}/{name}; done; echo secret'
        )
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    shell = ["sh", "-euc", "\n".join(blocks(CHAPTERS[:1]).values())]
    done = subprocess.run(shell, cwd=tmp_path / "checkout", env=environment, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    places = [Path(place) for place in (tmp_path / "kubectl").read_text().splitlines() if "/deploy/" in place]
    assert [place.name for place in places] == ["api_keys", "hf_token", "cpu"]
    assert [place for place in places if not place.exists()] == []
    assert f"{tmp_path}/checkout/deploy/compose" in (tmp_path / "docker").read_text()
    deploy = tmp_path / "checkout" / "deploy"
    assert (deploy / "secrets" / "api_keys").read_text() == "secret\n"
    settings = dict(line.split("=", 1) for line in (deploy / ".env").read_text().splitlines() if "=" in line[:30])
    assert settings["COMPOSE_PROFILES"] == "cpu,monitoring,alerts"
    assert (deploy / settings["ALERTMANAGER_CONFIG"]).is_file()
    example = (DEPLOY / ".env.example").read_text()
    assert f"SERVER_IMAGE_CPU={settings['SERVER_IMAGE_CPU']}\n" in example  # rolled back to what it was


def test_every_command_of_the_deployment_is_run_on_an_engine_or_says_why_not() -> None:
    followed = {
        (heading, int(number))
        for file in (DEPLOY.parent / "tests" / "container").glob("*.py")
        for heading, number in re.findall(r'\.follow\("([^"]+)", (\d+)\)', file.read_text())
    } | {("Replicas", 1), ("Replicas", 2)}  # by a parameter
    assert followed == {
        place for place, block in blocks().items() if not set(to_run(block).split()) <= {"cd", "..", "deploy"}
    }
    marks = re.findall(r"# not run.*", "".join(blocks().values()))
    assert marks
    assert [mark for mark in marks if not re.fullmatch(r"# not run: \w.*", mark)] == []


def test_commands_that_are_not_run_are_left_out_whole() -> None:
    assert to_run("a \\\n  b  # not run: c\nd\ne \\\n  f\n") == "d\ne \\\n  f\n"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder with the script and a lock of its own."""
    (tmp_path / "lock-images.sh").write_bytes((DEPLOY / "lock-images.sh").read_bytes())
    (tmp_path / "lock-images.sh").chmod(0o755)
    (tmp_path / "images.lock").write_text("# Words\nA_IMAGE=a/b:v1.2.3\nB_IMAGE=c:4.5.6-x@sha256:old\n")
    return tmp_path


def lock_images(folder: Path, docker: str) -> subprocess.CompletedProcess[str]:
    program(folder / "bin", "docker", docker)
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run([folder / "lock-images.sh"], env=environment, capture_output=True, text=True, timeout=20)


def test_a_release_puts_the_registrys_digests_behind_the_tags(release: Path) -> None:
    digest = "sha256:" + "ab" * 32
    # A bare field is answered with buildx's table of everything, a string as it is.
    answer = f"""
    case "$*" in
        *'{{{{.Manifest.Digest}}}}'*) printf 'Name: a\nMediaType: b\nDigest: {digest}\n' ;;
        *'{{{{printf "%s" .Manifest.Digest}}}}'*) printf %s {digest} ;;
        *) exit 1 ;;
    esac"""
    done = lock_images(release, f'echo "$@" >>{release}/asked\n{answer}')
    assert done.returncode == 0
    assert (
        release / "images.lock"
    ).read_text() == f"# Words\nA_IMAGE=a/b:v1.2.3@{digest}\nB_IMAGE=c:4.5.6-x@{digest}\n"
    assert [line.split()[-1] for line in (release / "asked").read_text().splitlines()] == ["a/b:v1.2.3", "c:4.5.6-x"]


@pytest.mark.parametrize("docker", ["echo no such image", "exit 1"])
def test_a_digest_that_is_none_changes_nothing(release: Path, docker: str) -> None:
    before = (release / "images.lock").read_text()
    assert lock_images(release, docker).returncode == 1
    assert (release / "images.lock").read_text() == before
    assert not (release / "images.lock.new").exists()
