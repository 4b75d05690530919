"""What the chat shows: text in the specialists' colours, and nothing that could steer the terminal. Knows no server.

Colours are the terminal's own, left out where there are none: NO_COLOR, a dumb terminal, none.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prompt_toolkit import print_formatted_text
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.utils import is_dumb_terminal

from ultrafuser.server.terminal.pieces import Piece, leader_of, mean_weights

COLOURS = ("ansicyan", "ansiyellow", "ansimagenta", "ansigreen", "ansiblue", "ansired")
"""Of the specialists in their order; those behind them begin anew."""

QUIET = "ansibrightblack"
"""Of thoughts, and of what the chat itself says."""

_BAR_CELLS = 30

# Control characters as their pictures; those of the second set, and those that turn the direction of text, have none.
_VISIBLE = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
)


def visible(text: str) -> str:
    """The text with control characters made visible: a model, or a server, could write over the screen with them."""
    return text.translate(_VISIBLE)


class Screen:
    """Standard output."""

    def __init__(self, specialists: Sequence[str]) -> None:
        self._specialists = specialists
        self._is_terminal = sys.stdout.isatty()

    def write(self, text: str, style: str = "") -> None:
        """Show a text, where it is."""
        if not text:
            return
        if self._is_terminal and not is_dumb_terminal():
            print_formatted_text(FormattedText([(style, visible(text))]), end="", flush=True)
        else:
            sys.stdout.write(visible(text) if self._is_terminal else text)
            sys.stdout.flush()

    def say(self, text: str) -> None:
        """A line of the chat's own; it does not get into a file of answers."""
        if self._is_terminal:
            self.write(f"{text}\n", QUIET)
        else:
            print(visible(text), file=sys.stderr, flush=True)

    def piece(self, piece: Piece) -> None:
        """A part of an answer, in the colour of the specialist that leads there."""
        self.write(piece.text, self._colour(leader_of(piece.weights)) if piece.weights else "")

    def legend(self) -> None:
        """The specialists' names in their colours."""
        for index, name in enumerate(self._specialists):
            self.write(name, self._colour(index))
            self.write("\n" if name == self._specialists[-1] else " ")

    def weights(self, pieces: Sequence[Piece]) -> None:
        """How much each specialist counted for an answer: its mean weight, and the tokens that it leads."""
        rows = [piece.weights for piece in pieces if piece.weights]
        leaders = [leader_of(row) for row in rows]
        width = max(map(len, self._specialists), default=0)
        for index, (name, mean) in enumerate(zip(self._specialists, mean_weights(pieces), strict=True)):
            self.write(f"{name:{width}}  {mean:.3f}  ")
            self.write("█" * round(mean * _BAR_CELLS), self._colour(index))
            self.write(f"{'':{_BAR_CELLS - round(mean * _BAR_CELLS)}}  leads {leaders.count(index)} of {len(rows)}\n")

    def _colour(self, index: int) -> str:
        return COLOURS[index % len(COLOURS)]


@contextmanager
def keyboard_waits() -> Iterator[None]:
    """Drop what is typed or pasted meanwhile: it would be taken for messages line by line. Ctrl-C works."""
    import termios

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSAFLUSH, before)
