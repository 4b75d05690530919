"""Every module has its room, every room its purpose and its line in a document, every file name one meaning."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.rooms import PAGE, README_TREE, ROOT, contracts, rooms_of, with_drawing

SOURCES = [path for top in ("server", "gating") for path in sorted((ROOT / top).rglob("*.py"))]
ROOMS = sorted({path.parent for path in SOURCES if (path.parent / "__init__.py").exists()})
MEANS_THE_SAME_EVERYWHERE = {"__init__", "command", "settings", "errors"}
"""File names that stand in several rooms: its purpose, its command, that command's settings, what can go wrong."""


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("room", ROOMS, ids=named)
def test_a_room_says_what_it_is_for_and_what_it_does_not_know(room: Path) -> None:
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    assert len(text.split()) > 8
    assert any(word in text.lower().split() for word in ("no", "never", "not", "nothing", "nobody", "none")), text


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=named)
def test_a_module_is_in_a_room_that_a_document_names(path: Path) -> None:
    folder = f"{named(path.parent)}/"
    assert folder in README_TREE, f"the README's tree has no line for {folder}"
    if path.parent.name in ("server", "gating") and path.stem != "__main__":
        assert path.name in README_TREE[folder], (
            f"{path.name} is on the floor of {folder}, and the tree does not say so"
        )


def test_a_file_name_has_one_meaning() -> None:
    counts = Counter(path.stem for path in SOURCES)
    assert {name for name, count in counts.items() if count > 1} <= MEANS_THE_SAME_EVERYWHERE


def test_every_room_has_its_arrows_in_a_contract() -> None:
    placed = {
        f"{contract['containers'][0].removeprefix('ultrafuser.').replace('.', '/')}/{room}"
        for contract in contracts()
        for layer in contract["layers"]
        for room in rooms_of(layer)
    }
    assert {named(room) for room in ROOMS} - {"server", "gating"} - placed == set()


def test_the_drawing_is_what_the_contracts_and_the_imports_say() -> None:
    page = PAGE.read_text()
    assert with_drawing(page) == page, "run `python -m tests.rooms`"


def test_tests_mirror_the_rooms() -> None:
    rooms = {named(room) for room in ROOMS}
    folders = {
        path.parent.relative_to(ROOT / "tests").as_posix()
        for top in ("server", "gating")
        for path in (ROOT / "tests" / top).rglob("test_*.py")
    }
    assert folders - rooms == set()
