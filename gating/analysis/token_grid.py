"""Conversations as a picture (paper: Figures 8, 9): characters on a grid, coloured by the gate.

Knows shown conversations. The grid is laid out without matplotlib's help: that could not wrap coloured words.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ultrafuser.gating.analysis.pictures import DPI
from ultrafuser.gating.analysis.styles import CONTROLS, NUM_LEVELS, level, style_of
from ultrafuser.gating.analysis.transcripts import ShownConversation

NUM_COLUMNS = 110
MOST_LINES = 40
"""Of one response; what follows is counted, not shown."""
_MOST_PROMPT_LINES = 4
_MOST_TURNS = 3
_MOST_CONVERSATIONS = 12
"""With these limits a picture stays below the 65,536 pixels that Agg can draw."""

# Whole pixels: characters are hinted to them, and those of a word would not fill their cells.
_CELL_WIDTH = 9 / DPI
_FONT_SIZE = 72 * _CELL_WIDTH / 0.602  # points; the characters of DejaVu Sans Mono have this width
_LINE_HEIGHT = 1.8 * _FONT_SIZE / 72
_MARGIN = 0.2
_STRONGEST = 0.6
_FAINT = "#5c636e"
# Tighter than matplotlib's own: a word is short.
_UNDERLINES: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0, ()),
    (0, (2.5, 1.2)),
    (0, (0.7, 1.1)),
    (0, (4, 1, 0.7, 1)),
    (0, (1, 3)),
)
# The first two come with matplotlib; of the others those are used that are installed.
_FAMILIES = (
    "DejaVu Sans Mono", "DejaVu Sans", "Noto Sans Mono CJK SC", "Noto Sans CJK SC", "Noto Sans CJK JP",
    "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Noto Emoji", "Segoe UI Symbol",
    "Apple Symbols",
)  # fmt: skip
_MISSING = "\u25a1"


@dataclass(frozen=True)
class TextRun:
    """Characters of one token that stand on one line."""

    line: int
    column: int
    width: int
    """Cells."""

    text: str
    owner: int
    """Number of the text that they are of."""


def lay_out(texts: Sequence[str], num_columns: int = NUM_COLUMNS) -> list[TextRun]:
    """Texts one after the other on a grid; a line ends at its last column, and after each line end in the texts.

    A text that fits on a line is not broken. Wide characters (CJK, emoji) take two cells, combining marks none. A line
    end is shown by an arrow; tabs go to the next column that is a multiple of four. What is not as wide as
    a character of the first font is a run of its own.
    """
    runs: list[TextRun] = []
    line = column = 0
    for owner, text in enumerate(texts):
        is_open = False  # whether the last run goes on
        width = sum(_cells(character, 0)[1] for character in text.partition("\n")[0])
        if column + width > num_columns and width <= num_columns:
            line, column = line + 1, 0
        for character in text:
            shown, width = _cells(character, column)
            if column + width > num_columns and width and character != "\n":
                line, column, is_open = line + 1, 0, False
            is_alone = width > 1 or not _is_regular(shown)
            last = runs[-1] if is_open and not is_alone else TextRun(line, column, 0, "", owner)
            run = TextRun(last.line, last.column, last.width + width, last.text + shown, owner)
            if last.text:
                runs[-1] = run
            else:
                runs.append(run)
            column += width
            is_open = not is_alone
            if character == "\n":
                line, column, is_open = line + 1, 0, False
    return runs


@dataclass(frozen=True)
class _Look:
    """Of one text."""

    ink: str = "black"
    leader: int | None = None
    level: int = 0
    is_heading: bool = False


@dataclass(frozen=True)
class _Block:
    """Texts that begin on a line of their own."""

    texts: Sequence[str]
    looks: Sequence[_Look]
    begin: int | None = None
    end: int | None = None
    """Which of its lines are shown, as in a slice."""


def draw_tokens(specialists: Sequence[str], conversations: Sequence[ShownConversation]) -> Figure:
    """The response tokens of some conversations, coloured and underlined by their leading specialists."""
    blocks = [_legend(specialists), _plain(" ", _Look())]
    for conversation in conversations[:_MOST_CONVERSATIONS]:
        blocks += _blocks(conversation)
    placed: list[tuple[TextRun, _Look]] = []
    num_lines = 0
    for block in blocks:
        runs = lay_out(block.texts)
        shown = range(1 + max((run.line for run in runs), default=0))[block.begin : block.end]
        for run in runs:
            if run.line in shown:
                placed.append((replace(run, line=num_lines + run.line - shown[0]), block.looks[run.owner]))
        num_lines += len(shown)
    width, height = NUM_COLUMNS * _CELL_WIDTH + 2 * _MARGIN, num_lines * _LINE_HEIGHT + 2 * _MARGIN
    figure = Figure(figsize=(width, height))
    chart = figure.add_axes((_MARGIN / width, _MARGIN / height, 1 - 2 * _MARGIN / width, 1 - 2 * _MARGIN / height))
    chart.set(xlim=(0, NUM_COLUMNS), ylim=(num_lines, 0))
    chart.set_axis_off()
    _draw(chart, placed)
    return figure


def _legend(specialists: Sequence[str]) -> _Block:
    texts, looks = [], []
    for index, name in enumerate(specialists):
        texts += [f" {name} ", "  "]
        looks += [_Look(leader=index, level=NUM_LEVELS), _Look()]
    texts.append("leads at the token; the stronger the colour, the larger its weight")
    return _Block(texts, [*looks, _Look(_FAINT)])


def _blocks(conversation: ShownConversation) -> list[_Block]:
    """Heading, then the last lines of each prompt and the first lines of the response to it."""
    blocks = [_plain(f"{conversation.domain}, conversation {conversation.number}", _Look(is_heading=True))]
    for turn in conversation.turns[:_MOST_TURNS]:
        blocks.append(_plain(turn.prompt.rstrip("\n"), _Look(_FAINT), -_MOST_PROMPT_LINES))
        texts = [token.text or "\u00b7" for token in turn.tokens]
        looks = [_Look(leader=token.leader, level=level(token.weights)) for token in turn.tokens]
        blocks.append(_Block(texts, looks, end=MOST_LINES))
        hidden = {run.owner for run in lay_out(texts) if run.line >= MOST_LINES}
        if hidden:
            blocks.append(_plain(f"({len(hidden):,} more tokens)", _Look(_FAINT)))
    if len(conversation.turns) > _MOST_TURNS:
        blocks.append(_plain(f"({len(conversation.turns) - _MOST_TURNS:,} more turns)", _Look(_FAINT)))
    return [*blocks, _plain(" ", _Look())]


def _plain(text: str, look: _Look, begin: int | None = None) -> _Block:
    words = re.findall(r"\s*\S+|\s+", text)
    return _Block(words, [look] * len(words), begin)


def _draw(chart: Axes, placed: Sequence[tuple[TextRun, _Look]]) -> None:
    for run, look in placed:
        if look.leader is not None and run.width:
            colour, alpha = style_of(look.leader).colour, _STRONGEST * look.level / NUM_LEVELS
            chart.add_patch(Rectangle((run.column, run.line), run.width, 0.92, color=colour, alpha=alpha, linewidth=0))
        # Without parse_math: a response may be full of dollars.
        chart.text(
            run.column, run.line + 0.66, run.text, color=look.ink, fontsize=_FONT_SIZE, family=_families(),
            weight="bold" if look.is_heading else "normal", verticalalignment="baseline", parse_math=False,
        )  # fmt: skip
    for leader in sorted({look.leader for _, look in placed if look.leader is not None}):
        runs = [run for run, look in placed if look.leader == leader]
        chart.hlines(
            [run.line + 0.88 for run in runs],
            [run.column for run in runs],
            [run.column + run.width for run in runs],
            colors=style_of(leader).colour,
            linestyles=_UNDERLINES[leader % len(_UNDERLINES)],
            linewidth=1.3,
        )


def _cells(character: str, column: int) -> tuple[str, int]:
    """How a character is shown, and how many cells it takes."""
    if character == "\n":
        return "\u21b5", 1
    if character == "\t":
        return " " * (4 - column % 4), 4 - column % 4
    character = character.translate(CONTROLS)
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return (character if _can_draw(character) else ""), 0
    width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return (character if _can_draw(character) else _MISSING), width


@cache
def _families() -> list[str]:
    installed = set(font_manager.get_font_names())
    return [name for name in _FAMILIES if name in installed]


@cache
def _can_draw(character: str) -> bool:
    return any(_has(name, character) for name in _families())


@cache
def _is_regular(characters: str) -> bool:
    return all(_has(_FAMILIES[0], character) for character in characters)


def _has(family: str, character: str) -> bool:
    return bool(font_manager.get_font(font_manager.findfont(family)).get_char_index(ord(character)))
