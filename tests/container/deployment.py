"""A checkout of its own whose deployment runs on the container engine of this machine, by the commands of the page."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from tests.container.page import blocks, to_run

ROOT = Path(__file__).parent.parent.parent
STEP_SECONDS = 1200
"""How long one command of the page may take: the build asks package indexes for gigabytes."""

PROJECT = "ultrafuser-test"
"""Compose's name for all of it, so that a deployment that this machine already has is left alone."""


class Deployment:
    """Commands run in the folder `deploy` of a copy of this checkout, which the engine must see under the same path."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            if (ROOT / name).exists():  # not what was deleted, and not yet committed
                (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.checkout / name, follow_symlinks=False)
        self.folder = self.checkout / "deploy"
        # What .env says is not overruled from outside.
        settings = re.findall(r"^(\w+)=", (self.folder / ".env.example").read_text(), re.MULTILINE)
        self.environment = {name: value for name, value in os.environ.items() if name not in settings}
        self.environment["COMPOSE_PROJECT_NAME"] = PROJECT

    def run(self, script: str, folder: Path | None = None) -> str:
        """Run a script; returns its output.

        Raises:
            AssertionError: a command fails; with the end of what was written, errors too.
        """
        done = subprocess.run(
            ["sh", "-euc", script],
            cwd=folder or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=STEP_SECONDS,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def follow(self, heading: str, number: int) -> str:
        """Run a block of the page, and say so."""
        block = to_run(blocks()[heading, number])
        began = time.monotonic()
        output = self.run(block, self.checkout if block.startswith("cd deploy\n") else None)
        print(f"\n{block}[{time.monotonic() - began:.1f} s]")
        return output

    def set(self, **variables: str) -> None:
        """Edit .env."""
        file = self.folder / ".env"
        text = file.read_text()
        for name, value in variables.items():
            text, count = re.subn(rf"^{name}=.*", f"{name}={value}", text, flags=re.MULTILINE)
            assert count == 1, name
        file.write_text(text)

    def key(self) -> str:
        """The API key."""
        return (self.folder / "secrets" / "api_keys").read_text().strip()

    def client(self, key: str | None = None) -> openai.OpenAI:
        """The official client, which tries nothing twice."""
        address = "http://127.0.0.1:8000/v1"
        return openai.OpenAI(base_url=address, api_key=key or self.key(), max_retries=0, timeout=120)

    def python(self, service: str, code: str) -> str:
        """Run Python in a service's container."""
        return self.run(f"docker compose exec --no-TTY {service} python -c '{code}'")

    def state(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's container, running or not."""
        name = self.run(f"docker compose ps --all --quiet {service}").strip()
        state: dict[str, Any] = json.loads(self.run(f"docker inspect {name}"))[0]
        return state

    def change_code(self) -> str:
        """Change a line of the server's code; returns Python that says whether it runs the changed one."""
        mark = f"CHANGED_{time.monotonic_ns()}"
        with (self.checkout / "ultrafuser" / "__init__.py").open("a") as file:
            file.write(f"\n{mark} = True\n")
        return f'import ultrafuser; print("{mark}" in vars(ultrafuser))'

    def layers(self, image: str) -> list[str]:
        """The digests of an image's layers, from the base on."""
        layers: list[str] = json.loads(self.run(f"docker image inspect --format '{{{{json .RootFS.Layers}}}}' {image}"))
        return layers

    def ask_inside(self, service: str, url: str) -> Any:
        """The JSON at an address that is reached from a monitoring container only."""
        return json.loads(self.run(f"docker compose exec --no-TTY {service} wget -qO- '{url}'"))

    def wait(self, what: Callable[[], bool], seconds: float) -> None:
        """Wait until something holds.

        Raises:
            AssertionError: it does not within the time.
        """
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"not within {seconds} s"
            time.sleep(1)


def stand_ins() -> dict[str, str]:
    """The images of images.lock that are not what their names say, with what they are."""
    found = {}
    for image in base_images():
        show = ["docker", "image", "inspect", "--format", '{{index .Config.Labels "ultrafuser.stand-in"}}', image]
        if said := subprocess.check_output(show, text=True).strip():
            found[image] = said
    return found


def base_images() -> list[str]:
    """What images.lock names."""
    return re.findall(r"^\w+=(\S+)$", (ROOT / "deploy" / "images.lock").read_text(), re.MULTILINE)
