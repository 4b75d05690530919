"""The one deployment of this folder's tests; why they are skipped."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.deployment import Deployment, base_images, stand_ins
from tests.fakes import write_tiny_fusion

HINT = (
    "on an engine that reaches no registry, tests/container/stand-ins.sh makes images of Debian's packages in its place"
)

OF_THE_MACHINE = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "CA_BUNDLE", "SERVER_FILES")
"""Settings that are taken from the environment of the tests into .env, as is the content of the file PIP_CONF."""


def says(*command: str) -> str | None:
    """Why a command fails; None if it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except OSError as error:
        return str(error)
    return (done.stderr.strip() or "no word").splitlines()[-1] if done.returncode else None


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Nothing of it is built or started yet; at the end all of it is removed but the images."""
    for command in (["docker", "version"], ["docker", "compose", "version"], ["docker", "buildx", "version"]):
        if reason := says(*command):
            pytest.skip(f"{' '.join(command)}: {reason}")
    for image in base_images():
        if says("docker", "image", "inspect", image) and (reason := says("docker", "pull", image)):
            pytest.skip(f"{image}: {reason}; {HINT}")
    print(f"stand-ins: {stand_ins() or 'none'}")
    deployment = Deployment(tmp_path_factory.mktemp("container"))
    remove = 'docker compose --profile "*" down --volumes --remove-orphans'
    deployment.run(remove)
    try:
        yield deployment
    finally:
        deployment.run('docker compose --profile "*" logs --no-color --tail 60 >logs.txt 2>&1')
        print((deployment.folder / "logs.txt").read_text())
        deployment.run(remove)


def prepare(deployment: Deployment) -> None:
    """Settings and secrets as the page has them, and in .env what this machine needs to build and to start."""
    deployment.follow("Start", 0)
    (deployment.folder / "secrets" / "pip.conf").write_text(pip_configuration())
    own = {name: os.environ[name] for name in OF_THE_MACHINE if name in os.environ}
    deployment.set(PIP_CONF="./secrets/pip.conf", **own)


def write_tiny(deployment: Deployment) -> None:
    """A fusion that starts in seconds, where user 10001 can read it."""
    write_tiny_fusion(deployment.folder / "fusion")
    for path in (deployment.folder / "fusion").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    deployment.set(FUSION="/fusion/fusion.yaml")


def pip_configuration() -> str:
    """What the caller's PIP_CONF says, with a mark to look for in the image."""
    file = os.environ.get("PIP_CONF")
    own = Path(file).read_text(encoding="utf-8") if file else "[global]\n"
    return f"{own}\n# told-in-secret\n"
