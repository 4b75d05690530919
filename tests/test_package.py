"""The package as users have it: its names, what importing it loads, what is installed, and beside whose modules."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ultrafuser
from tests.fakes import write_tiny_fusion

ROOT = Path(__file__).parent.parent
FOLDERS = ("gating", "server")
SCRIPT = """
import json
import sys
from pathlib import Path

import gating
import psutil
import server
from vllm import SamplingParams

from ultrafuser import FusedLLM

if __name__ == "__main__":
    llm = FusedLLM(sys.argv[1])
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, extra_args={"gate_weights": True})
    (completion,) = llm.generate(["the fused model"], greedy, use_tqdm=False)[0].outputs
    told = {
        "num_tokens": len(completion.token_ids),
        "weights": completion.gate_weights.tolist(),
        "owners": [gating.OWNER, server.OWNER],
        "processes": [process.name() for process in psutil.Process().children(recursive=True)],
    }
    Path(sys.argv[2]).write_text(json.dumps(told))
"""


def interpret(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ultrafuser.__all__)
def test_each_public_name_is_there_for_a_fresh_interpreter(name: str) -> None:
    printed = interpret(f"from ultrafuser import {name}; print(getattr({name}, '__name__', {name}))")
    assert printed == f"{ultrafuser.__version__ if name == '__version__' else name}\n"


def test_importing_the_package_alone_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, ultrafuser; print({name.partition('.')[0] for name in sys.modules} & {'torch', 'vllm'})"
    assert interpret(code) == "set()\n"


def test_a_name_that_is_not_public_is_an_error() -> None:
    assert dir(ultrafuser) == sorted(ultrafuser.__all__)
    with pytest.raises(AttributeError, match="module 'ultrafuser' has no attribute 'Fused'"):
        ultrafuser.Fused  # type: ignore[attr-defined]  # noqa: B018


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pip installs: the tree's wheel, unpacked. Made of a copy, for setuptools builds beside it."""
    tree, wheels, site = (tmp_path_factory.mktemp(name) for name in ("tree", "wheels", "site"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for name in (*FOLDERS, "ultrafuser"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(wheels), str(tree)], check=True, timeout=200
    )
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_every_file_of_the_sources_is_installed(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    there = {name.removeprefix("ultrafuser/") for name in files(installed)}
    for folder in FOLDERS:
        wanted = {f"{folder}/{name}" for name in files(ROOT / folder) if "__pycache__" not in name}
        assert {f"{folder}/__init__.py"} < wanted
        assert wanted - there == set()


def test_one_package_is_installed_and_no_other(installed: Path) -> None:
    assert {path.name for path in installed.iterdir()} == {
        "ultrafuser",
        f"ultrafuser-{ultrafuser.__version__}.dist-info",
    }


@pytest.mark.parametrize(("folder", "module"), [("gating", "model"), ("gating", "model.gate"), ("server", "app")])
def test_no_module_has_a_second_name_in_the_repository(folder: str, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}.{module}"], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert re.search(r"ImportError: .+ is imported as ultrafuser\.", done.stderr)


@pytest.mark.slow
@pytest.mark.timeout(600)  # its own limit, below, tells more
def test_a_fused_model_runs_beside_a_users_own_server_and_gating(installed: Path, tmp_path: Path) -> None:
    """A user's server.py was found for ours, by the script and by the engine's processes, which import by name."""
    fusion = write_tiny_fusion(tmp_path / "tiny")
    folder = tmp_path / "users"
    folder.mkdir()
    for name in ("gating", "server"):
        (folder / f"{name}.py").write_text("OWNER = 'user'\n")
    (folder / "script.py").write_text(SCRIPT)
    # Other tests' conftest has the engine in this process; a user has not.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, "script.py", str(fusion), "told.json"],
        cwd=folder, env={**environment, "PYTHONPATH": str(installed)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    told = json.loads((folder / "told.json").read_text())
    assert told["num_tokens"] == len(told["weights"]) == 8
    assert [sum(row) for row in told["weights"]] == pytest.approx([1] * 8)
    assert told["owners"] == ["user", "user"]
    assert {"VLLM::EngineCore", "VLLM::Worker"} <= set(told["processes"])
