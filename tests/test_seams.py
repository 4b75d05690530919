"""The border to vLLM: docs/architecture.md lists every seam, and each is there in the installed release, with the
signature that it is used with. After an upgrade the failures are the list of what to look at."""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.test_border import REQUEST_MODELS, of_vllm

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()


class Seam(NamedTuple):
    """One member of one of vLLM's modules or classes, as a row of the table names it."""

    owner: str
    """Dotted name."""

    member: str
    """A field or attribute, or a function with the parameters it is used with; empty: the owner itself."""

    files: list[str]
    """Of ours that use it."""


def seams() -> list[Seam]:
    (table,) = re.findall(r"^\| seam in vLLM .*?\n\|[-|]+\n(.*?)^$", PAGE, re.MULTILINE | re.DOTALL)
    found = []
    for row in table.splitlines():
        names, ours, purpose, loss = (cell.strip() for cell in row.strip("|").split(" | "))
        assert purpose, row
        assert loss, row
        owner, *members = re.findall(r"`([^`]+)`", names)
        found += [Seam(owner, member, re.findall(r"`([^`]+)`", ours)) for member in members or [""]]
    return found


def resolve(dotted: str) -> Any:
    """The module, class or function of a dotted name."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not dotted.startswith(str(error.name)):
                raise
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


def has(owner: Any, name: str) -> bool:
    """Whether an object has an attribute, or a class declares it or gives it to its instances."""
    if hasattr(owner, name):
        return True
    for base in getattr(owner, "__mro__", ())[:-1]:
        if name in vars(base).get("__annotations__", {}):
            return True
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue
        if re.search(rf"\bself\.{name}\b(: [^=\n]+)? = |\bself\.{name}, |, self\.{name}\b.* = ", source):
            return True
    return False


def parameters(call: str) -> tuple[str, list[str]]:
    """A call as its name and the names of its parameters; "..." passes on whatever comes."""
    name, _, rest = call.partition("(")
    return name, [word.strip() for word in rest.rstrip(")").split(",") if word.strip()]


@pytest.mark.parametrize("seam", seams(), ids=lambda seam: f"{seam.owner}.{seam.member}".rstrip("."))
def test_a_seam_is_there_with_the_signature_it_is_used_with(seam: Seam) -> None:
    if seam.owner.startswith("vllm.v1.executor.ray_"):
        pytest.importorskip("ray", reason="needs Ray: pip install 'ultrafuser[ray]'")
    owner = resolve(seam.owner)
    if not seam.member:
        return
    name, used = parameters(seam.member)
    assert has(owner, name), f"{seam.owner} has no {name}"
    if "(" not in seam.member:
        return
    signature = inspect.signature(getattr(owner, name)).parameters
    theirs = [own for own in signature if own not in ("self", "cls")]
    named = [own for own in used if own != "..."]
    assert [own for own in theirs if own in named] == named, f"{seam.owner}.{name} takes {theirs}"
    if len(named) < len(used):
        return
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        own for own in theirs if signature[own].default is signature[own].empty and signature[own].kind not in kinds
    ]
    assert set(needed) <= set(used), f"{seam.owner}.{name} needs {needed}"


def test_every_import_of_vllm_is_a_seam_of_the_table() -> None:
    listed = {name for seam in seams() for name in (seam.owner, f"{seam.owner}.{parameters(seam.member)[0]}")}
    missing = {path: names - REQUEST_MODELS - {"vllm"} - listed for path, names in of_vllm("server").items()}
    assert {path: names for path, names in missing.items() if names} == {}


@pytest.mark.parametrize("seam", seams(), ids=lambda seam: f"{seam.owner}.{seam.member}".rstrip("."))
def test_a_seam_is_used_where_the_table_says(seam: Seam) -> None:
    name = parameters(seam.member)[0].replace("__init__", "") or seam.owner.rpartition(".")[2]
    users = [file for file in seam.files if re.search(rf"\b{re.escape(name)}\b", (ROOT / file).read_text())]
    assert users, f"none of {seam.files} uses {name}"
