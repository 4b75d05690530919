"""How specialists are told apart in pictures and on the page: by colour, and by a line for those who see no colour.

Knows colours only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Okabe and Ito's palette, safe for the colour-blind, without its black; sky blue is last, as a weak blue looks like it.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#56b4e9")
_CSS_LINES = ("solid", "dashed", "dotted", "double", "wavy")
PLOT_LINES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = "os^DvPX*"  # not as many as colours, so that a pair of both comes again late

# Control characters have no look of their own: they are shown by their pictures (Unicode has a block of them).
CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}

NUM_LEVELS = 10
"""Steps of a colour's strength above none."""


@dataclass(frozen=True)
class Style:
    """How one specialist looks."""

    colour: str
    """#rrggbb."""

    css_line: str
    """A CSS `text-decoration-style`."""

    plot_line: str | tuple[int, tuple[int, ...]]
    """A matplotlib line style."""

    @property
    def rgb(self) -> tuple[int, int, int]:
        """0 to 255."""
        return int(self.colour[1:3], 16), int(self.colour[3:5], 16), int(self.colour[5:7], 16)


def style_of(index: int) -> Style:
    """Of the specialist at this place; pairs of colour and line repeat after 35."""
    return Style(
        PALETTE[index % len(PALETTE)], _CSS_LINES[index % len(_CSS_LINES)], PLOT_LINES[index % len(PLOT_LINES)]
    )


def level(weights: Sequence[float]) -> int:
    """Strength of the leader's colour, 0 to 10: none at equal weights, full where it has all the weight."""
    least = 1 / len(weights)
    return round(NUM_LEVELS * (max(weights) - least) / (1 - least))
