"""What is imported is declared: in the base, or in the extra of the command that needs it, however late it is imported.

A distribution counts by its own name: that another one brings it is an accident of today.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"ultrafuser", "server", "gating", "benchmarks", "deploy", "tests"}


def declared(*extras: str) -> set[str]:
    """Names of the distributions that an installation with these extras asks for."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {_plain(re.split(r"[\[<>=!~ ;]", requirement)[0]) for own in lists for requirement in own}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, at its top or within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def file_of(name: str) -> Path | None:
    """Our file that a dotted name, or the longest part of it, is in."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None


def reached_from(*names: str) -> Iterator[Path]:
    """Our files that these modules import, and what those import."""
    seen: set[Path] = set()
    waiting = [path for name in names if (path := file_of(name))]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            yield path
            ours = [name for name in imports_of(path) if name.split(".")[0] in OURS]
            waiting += [found for name in ours if (found := file_of(name))]


def undeclared(files: Iterator[Path], known: set[str]) -> dict[str, str]:
    """Imported packages that are none of the distributions, each with a file that wants it."""
    found = {}
    distributions = packages_distributions()
    for path in files:
        for package in {name.split(".")[0] for name in imports_of(path)} - OURS - set(sys.stdlib_module_names):
            if not {_plain(name) for name in distributions.get(package, [package])} & known:
                found[package] = path.relative_to(ROOT).as_posix()
    return found


@pytest.mark.parametrize(
    ("module", "extras"),
    [
        ("ultrafuser.server.__main__", ("cpu", "cuda", "ray")),
        ("ultrafuser.server.llm", ("cpu", "cuda", "ray")),
        ("ultrafuser.server.terminal.command", ()),
        ("ultrafuser.server.batch.command", ("cpu", "cuda", "ray")),
        ("ultrafuser.server.batch.in_process", ("cpu", "cuda", "ray")),
        ("ultrafuser.server.doctor.command", ("cpu", "cuda", "ray")),
        ("ultrafuser.gating.training.command", ("train",)),
        ("ultrafuser.gating.evaluation.command", ("eval",)),
        ("ultrafuser.gating.analysis.command", ("eval",)),
        ("ultrafuser.gating.synthesis.command", ("data",)),
        ("ultrafuser.gating.model.reference", ()),
    ],
)
def test_a_command_declares_what_it_imports(module: str, extras: tuple[str, ...]) -> None:
    files = list(reached_from(module))
    assert len(files) > 5
    assert undeclared(iter(files), declared(*extras)) == {}


@pytest.mark.parametrize("folder", sorted(OURS))
def test_everything_that_is_imported_anywhere_is_declared(folder: str) -> None:
    everything = declared(*PROJECT["optional-dependencies"])
    assert undeclared(iter(sorted((ROOT / folder).rglob("*.py"))), everything) == {}


def test_what_nobody_declares_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_dependencies.ROOT", tmp_path)
    late = tmp_path / "late.py"
    late.write_text("import json\ndef f():\n    from yaml import safe_load\n    import sklearn.manifold\n")
    assert undeclared(iter([late]), {"pyyaml"}) == {"sklearn": "late.py"}
