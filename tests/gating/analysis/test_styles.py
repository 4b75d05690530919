"""How specialists are told apart: as many as a fusion is likely to have, at any strength, by colour and by line."""

from itertools import combinations, product

import numpy as np
import pytest

from ultrafuser.gating.analysis.styles import PALETTE, style_of

FIVE = [style_of(index) for index in range(5)]


def lightness_and_hue(colour: tuple[float, ...]) -> np.ndarray:
    """CIE L*a*b* of an sRGB colour, 0 to 1 each; about 2.3 apart is the least that is noticed side by side."""
    channels = np.array(colour)
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(("paper", "most"), [(0.98, 0.6), (0.08, 0.48)], ids=["light", "dark"])
def test_no_strength_of_one_of_five_colours_looks_like_any_of_another(paper: float, most: float) -> None:
    """A weak blue once looked like the fifth, a light blue."""
    strengths = np.linspace(0.3, 1, 15) * most
    tints = [
        [lightness_and_hue(tuple(paper * (1 - s) + s * part / 255 for part in style.rgb)) for s in strengths]
        for style in FIVE
    ]
    for (first, ours), (second, theirs) in combinations(enumerate(tints), 2):
        nearest = min(float(np.linalg.norm(one - other)) for one, other in product(ours, theirs))
        assert nearest > 6, (PALETTE[first], PALETTE[second])


def test_five_have_a_line_each_on_the_page_and_in_plots() -> None:
    assert len({style.css_line for style in FIVE}) == len({style.plot_line for style in FIVE}) == 5


def test_pairs_of_colour_and_line_repeat_after_35() -> None:
    assert len({(style.colour, style.css_line) for style in map(style_of, range(36))}) == 35
