"""Where the text of a chat template comes from: inline, shipped with this package, or a file. Does not render."""

import os
from pathlib import Path

_FOLDER = Path(__file__).parent
_JINJA_MARKS = ("{{", "{%", "{#")


class TemplateError(ValueError):
    """A chat template cannot be read, or a conversation cannot be put through it. One line."""


def template_names() -> tuple[str, ...]:
    """Names of the shipped templates."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))


def load_template(path_or_inline: str, folder: str | Path = ".") -> str:
    """Jinja text of a chat template.

    Args:
        path_or_inline: Jinja text (recognised by its braces), a shipped template's name, or a file.
        folder: what a relative path is relative to.

    Raises:
        TemplateError: none of the three.
    """
    if any(mark in path_or_inline for mark in _JINJA_MARKS):
        return path_or_inline
    if path_or_inline in template_names():
        return (_FOLDER / f"{path_or_inline}.jinja").read_text(encoding="utf-8")
    path = Path(folder) / Path(os.path.expanduser(path_or_inline))
    if not os.path.isfile(path):
        raise TemplateError(
            f"{path_or_inline!r:.200} is no file and no shipped template;"
            f" give a Jinja file, Jinja text, or one of {', '.join(template_names())}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path} cannot be read ({error}); give another Jinja file") from error
