"""The tools that the checks need: Python's from requirements/deploy.lock, the others out of Debian's packages.

Both are fetched once into a cache folder of their own, without root and without installing anything. Whence, pip's and
apt's own configuration says. HAProxy is the machine's own: it needs libraries of its release. Knows no checks.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ultrafuser.gating.model.cache import Artifact, Tick, build_once

ROOT = Path(__file__).resolve().parent.parent.parent
LOCK = ROOT / "requirements" / "deploy.lock"
DEBIAN_RELEASE = "trixie"
DEBIAN_TOOLS: Mapping[str, tuple[str, str]] = {
    "amtool": ("prometheus-alertmanager", "usr/bin/amtool"),
    "docker-compose": ("docker-compose", "usr/libexec/docker/cli-plugins/docker-compose"),
    "kustomize": ("kustomize", "usr/bin/kustomize"),
    "prometheus": ("prometheus", "usr/bin/prometheus"),
    "promtool": ("promtool", "usr/bin/promtool"),
}
"""By command: Debian's package, and the command's place in it."""

HAPROXY_BRANCH = "2.6"
"""What the balancer's configuration is written for, and its image is of (deploy/images.lock)."""

FETCH_SECONDS = 180
_NOT_FETCHED: dict[Path, str] = {}
"""Why, by folder: without a network, every check would wait for it again."""
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class NotRun(Exception):
    """A tool cannot be had here; the message says why, in one line."""


class Failed(Exception):
    """A tool has found something, or could not be started; the message is what it said."""


def call(tool: str, *arguments: str | Path, text: str | None = None, **variables: str) -> str:
    """Run a tool on files, or on `text`, with more variables in its environment; returns its output.

    Raises:
        NotRun: there is no such tool here.
        Failed: its exit status is not 0.
    """
    if tool in DEBIAN_TOOLS:
        command, environment = find_debian_tool(tool), dict(os.environ)
    elif tool == "haproxy":
        command, environment = find_haproxy(), dict(os.environ)
    else:
        folder = _python_tools()
        command, environment = folder / "bin" / tool, {**os.environ, "PYTHONPATH": str(folder)}
    return _run([command, *arguments], environment | variables, text)


def find_haproxy() -> Path:
    """This machine's HAProxy.

    Raises:
        NotRun: there is none, or one of another branch.
    """
    # Debian's place is not in every user's PATH.
    path = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
    if path is None:
        raise NotRun(f"needs HAProxy {HAPROXY_BRANCH}; on Debian 12: apt-get install haproxy")
    if not (version := _run([path, "-v"], os.environ)).startswith(f"HAProxy version {HAPROXY_BRANCH}."):
        raise NotRun(f"needs HAProxy {HAPROXY_BRANCH}, not {' '.join(version.split()[:3])}")
    return Path(path)


def find_debian_tool(tool: str) -> Path:
    """A command out of Debian's packages, fetched if need be; else the one that this machine has.

    Raises:
        NotRun: neither is there.
    """
    try:
        return _debian_tools() / DEBIAN_TOOLS[tool][1]
    except NotRun:
        if own := shutil.which(tool):
            return Path(own)
        raise


def _python_tools() -> Path:
    def install(folder: Path, _tick: Tick) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        pip += ["--retries", "1", "--timeout", "20"]
        _run([*pip, "--target", folder, "--requirement", LOCK], os.environ)

    parts = {"lock": LOCK.read_text(encoding="utf-8"), "python": sys.executable}
    return _fetch(Artifact("python", "installing the checks' tools", parts, install))


def _debian_tools() -> Path:
    packages = sorted(package for package, _ in DEBIAN_TOOLS.values())

    def unpack(folder: Path, _tick: Tick) -> None:
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb") and _KEYRING.exists()):
            raise Failed("apt-get, dpkg-deb and Debian's keyring are not all here")
        scratch = folder / "apt"
        (scratch / "lists" / "partial").mkdir(parents=True)
        source = f"deb [signed-by={_KEYRING}] {_archive()} {DEBIAN_RELEASE} main\n"
        (scratch / "sources.list").write_text(source, encoding="utf-8")
        apt = ["apt-get", "--quiet=2", *_apt_options(scratch)]
        _run([*apt, "update"], os.environ)
        _run([*apt, "download", *packages], os.environ, folder=scratch)
        for package in sorted(scratch.glob("*.deb")):
            _run(["dpkg-deb", "--extract", package, folder], os.environ)
        shutil.rmtree(scratch)

    parts = {"packages": packages, "release": DEBIAN_RELEASE}
    return _fetch(Artifact("debian", "fetching Debian's packages", parts, unpack))


def _fetch(artifact: Artifact) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ultrafuser-tools"
    folder = artifact.folder(cache)
    if folder not in _NOT_FETCHED:
        try:
            return build_once(artifact, cache, lambda _label, _share: None)
        except (Failed, OSError) as error:
            _NOT_FETCHED[folder] = f"{artifact.label}: {' '.join(str(error).split())[-300:]}"
    raise NotRun(_NOT_FETCHED[folder])


def _archive() -> str:
    """The Debian archive that this machine's apt asks.

    Raises:
        Failed: it asks none.
    """
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files if file.exists())
    found = re.search(r"^(?:deb|URIs:)\s.*?(https?://\S+/debian)/?(?:\s|$)", text, re.MULTILINE)
    if found is None:
        raise Failed("apt knows no Debian archive")
    return found[1]


def _apt_options(scratch: Path) -> list[str]:
    """A configuration of its own: nothing of the machine's is read but proxies, nothing is changed."""
    options = {
        "Dir::Etc::SourceList": scratch / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": scratch / "lists",
        "Dir::State::Status": "/dev/null",
        "Dir::Cache": scratch,
        "Acquire::Languages": "none",
        "Acquire::http::Timeout": "20",
        "APT::Sandbox::User": "",
    }
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def _run(
    command: Sequence[str | Path], environment: Mapping[str, str], text: str | None = None, folder: Path | None = None
) -> str:
    try:
        done = subprocess.run(
            command, env=environment, input=text, cwd=folder, capture_output=True, text=True, timeout=FETCH_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(str(error)) from error
    if done.returncode:
        raise Failed(f"{done.stdout}\n{done.stderr}".strip())
    return done.stdout
