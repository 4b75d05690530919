"""The commands of docs/operations.md, as a newcomer would copy them. Knows no engine."""

import re
from collections.abc import Sequence
from pathlib import Path

OPERATIONS = Path(__file__).parent.parent.parent / "docs" / "operations.md"
CHAPTERS = ("From nothing to a monitored service", "Replicas")
"""Those whose commands are run on a container engine, or marked as `# not run: the reason`."""


def blocks(chapters: Sequence[str] = CHAPTERS) -> dict[tuple[str, int], str]:
    """The shell blocks of these chapters, by the heading that they are under and their number there, from 0."""
    page = OPERATIONS.read_text(encoding="utf-8")
    found: dict[tuple[str, int], str] = {}
    for chapter in chapters:
        text = page.partition(f"\n## {chapter}\n")[2].partition("\n## ")[0]
        for section in f"### {chapter}\n{text}".split("\n### "):
            heading, _, body = section.removeprefix("### ").partition("\n")
            own = re.findall(r"^```sh\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
            found |= {(heading, number): block for number, block in enumerate(own)}
    return found


def to_run(block: str) -> str:
    """A block without the commands that are marked as not run."""
    commands = re.findall(r"(?:.*\\\n)*.+\n", block)
    return "".join(command for command in commands if "# not run" not in command)
