"""The page of conversations whose tokens are coloured by the gate: one HTML file, without scripts and other files.

What is in it stands in `page.jinja`. Knows shown conversations; does not know how their numbers were taken.
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ultrafuser.gating.analysis.styles import CONTROLS, NUM_LEVELS, Style, level, style_of
from ultrafuser.gating.analysis.transcripts import ShownConversation

_FOLDER = Path(__file__).parent
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_FOLDER), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True,
    keep_trailing_newline=True,
)  # fmt: skip

STYLE_SHEET = _FOLDER.joinpath("page.css").read_text(encoding="utf-8")
"""Colours of single specialists are added. Its `--most` is the opacity of the strongest colour behind a token: text on
it keeps a contrast of 4.5 in both schemes."""

_SPACES = {ord("\n"): "\u240a", ord("\t"): "\u2409", ord(" "): "\u2423"}
"""Where a token stands alone."""


def render_page(fusion: str, specialists: Sequence[str], conversations: Sequence[ShownConversation]) -> str:
    """The whole page.

    Args:
        fusion: name of the model.
        specialists: names, in the fusion's order.
        conversations: in the order in which they are shown.
    """
    style = STYLE_SHEET + "\n".join(_rules([style_of(index) for index in range(len(specialists))])) + "\n"
    return _ENVIRONMENT.get_template("page.jinja").render(
        fusion=fusion,
        specialists=specialists,
        conversations=conversations,
        style=style,
        digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        level=level,
        num_levels=NUM_LEVELS,
        controls=CONTROLS,
        spaces=_SPACES,
        zip=partial(zip, strict=True),
    )


def _rules(styles: Sequence[Style]) -> Iterator[str]:
    for index, style in enumerate(styles):
        red, green, blue = style.rgb
        yield f".s{index} {{ --own: {red} {green} {blue}; text-decoration-style: {style.css_line}; }}"
    for step in range(NUM_LEVELS + 1):
        yield f".w{step} {{ --strength: {step / NUM_LEVELS:.1f}; }}"
