"""The prompts: versioned Jinja files in `gating/synthesis/prompts/`, `NAME-VERSION.jinja`, of which the newest is used.

A prompt that is changed becomes a new file: its version is part of every id. Knows no domain and no call.
"""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

_FOLDER = Path(__file__).parents[1] / "prompts"
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_FOLDER), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
)


class Prompt:
    """One prompt in one version."""

    def __init__(self, name: str, version: int) -> None:
        self.identity = f"{name}-{version}"
        self._template: Template = _ENVIRONMENT.get_template(f"{self.identity}.jinja")

    def render(self, **values: Any) -> str:
        """The text; a value that the template wants and is not given is an error of ours."""
        return self._template.render(**values).strip()


@cache
def load_prompt(name: str) -> Prompt:
    """The newest version of a shipped prompt."""
    versions = [int(path.stem.rpartition("-")[2]) for path in _FOLDER.glob(f"{name}-*.jinja")]
    return Prompt(name, max(versions))


def prompt_names() -> tuple[str, ...]:
    """Names of the shipped prompts."""
    return tuple(sorted({path.stem.rpartition("-")[0] for path in _FOLDER.glob("*.jinja")}))
