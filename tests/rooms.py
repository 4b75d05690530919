"""The drawing of the rooms in docs/architecture.md, made from the contracts of import-linter in pyproject.toml and from
the imports as they are. `python -m tests.rooms` writes it; a test holds the page to it."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: `python -m tests.rooms` writes this -->\n", "<!-- end of rooms -->\n"


def _readme_tree() -> dict[str, str]:
    """The README's tree: each folder, with the folders that it is in, and what is said of it; "" is the top's files."""
    (tree,) = [block for block in (ROOT / "README.md").read_text().split("```\n") if block.startswith("ultrafuser/")]
    said, parents, folder = {"": ""}, {0: ""}, ""
    for line in tree.splitlines():
        indent, names, text = re.fullmatch(r"( *)(.*?)(  .*)?", line).groups()  # type: ignore[union-attr]
        if len(indent) <= max(parents) and names.split()[0].endswith("/"):
            for name in names.split():
                folder = parents[len(indent)] + name
                said[folder] = text or ""
            parents = {depth: parent for depth, parent in parents.items() if depth <= len(indent)}
            parents[len(indent) + 2] = folder
        elif indent:
            said[folder] += f" {names} {text or ''}"
        else:
            said[""] += f" {line}"
            folder = ""
    return said


README_TREE = _readme_tree()


def contracts() -> list[dict[str, Any]]:
    """The contracts that name layers, as pyproject.toml has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return [contract for contract in settings["contracts"] if "containers" in contract]


def rooms_of(layer: str) -> list[str]:
    """The rooms of one layer: "client | core | worker"."""
    return re.split(r"\s*[|:]\s*", layer)


def draw() -> str:
    """One block a contract: its rooms from the top to the bottom, each with the rooms that it imports."""
    graph = grimp.build_graph("ultrafuser", cache_dir=None)
    return "\n".join(_block(graph, contract) for contract in contracts())


def _block(graph: grimp.ImportGraph, contract: dict[str, Any]) -> str:
    (container,) = contract["containers"]
    width = max(len(layer) for layer in contract["layers"])
    rows = [f"{container.removeprefix('ultrafuser.').replace('.', '/')}/"]
    for layer in contract["layers"]:
        arrows = sorted({arrow for room in rooms_of(layer) for arrow in _arrows(graph, container, room, contract)})
        rows.append(f"  {layer:{width}}  {'-> ' + ' '.join(arrows) if arrows else ''}".rstrip())
    return "```\n" + "\n".join(rows) + "\n```\n"


def _arrows(graph: grimp.ImportGraph, container: str, room: str, contract: dict[str, Any]) -> Iterator[str]:
    importer = f"{container}.{room}"
    for layer in contract["layers"]:
        for other in rooms_of(layer):
            imported = f"{container}.{other}"
            if other != room and graph.direct_import_exists(importer=importer, imported=imported, as_packages=True):
                yield other


def with_drawing(page: str) -> str:
    """A page with the drawing as it is now between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + draw() + END + after


if __name__ == "__main__":
    PAGE.write_text(with_drawing(PAGE.read_text()))
