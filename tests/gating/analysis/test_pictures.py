"""Pictures: files of the size and with the content that they should have."""

import io

import matplotlib.image
import numpy as np
import pytest

from tests.gating.analysis.readings import conversation_of, reading_of
from ultrafuser.gating.analysis.pictures import DPI, HEATMAP_WIDTH, draw_heatmap, mean_by_position, png
from ultrafuser.gating.analysis.token_grid import MOST_LINES, NUM_COLUMNS, draw_tokens, lay_out

NAMES = ("text", "code")


def pixels(figure):
    return matplotlib.image.imread(io.BytesIO(png(figure)), format="png")


def test_the_heat_map_has_a_column_per_conversation_by_falling_weight_and_a_row_per_specialist():
    weights = [0.5, 0.9, 0.7]
    reading = reading_of([*(("text", [[own, 1 - own]]) for own in weights), ("code", [[0.1, 0.9]])], NAMES)
    figure = draw_heatmap(reading)
    first, second = [chart for chart in figure.axes if chart.images]
    assert np.asarray(first.images[0].get_array()) == pytest.approx(np.array([[0.9, 0.7, 0.5], [0.1, 0.3, 0.5]]))
    assert [chart.get_title() for chart in (first, second)] == ["text (3)", "code (1)"]
    assert [label.get_text() for label in first.get_yticklabels()] == list(NAMES)
    assert first.images[0].get_clim() == (0, 1), "pictures of two fusions can be compared"
    found = pixels(figure)
    assert found.shape[:2] == (round(DPI * (1.6 + 0.5 * 2)), round(DPI * HEATMAP_WIDTH))
    assert len(np.unique(found.reshape(-1, found.shape[2]), axis=0)) > 10


def test_positions_are_binned_ever_wider_and_end_where_few_responses_do():
    positions = np.concatenate([np.arange(50)] * 3 + [np.arange(80)])
    middles, means = mean_by_position(positions.astype(float), positions)
    assert middles[:3] == [1, 2, 3]
    assert means[:3] == [0, 1, 2]
    assert max(middles) <= 50, "one response alone goes on"
    assert means == pytest.approx([middle - 1 for middle in middles])
    assert len(middles) < 25
    assert mean_by_position(np.array([2.0, 4.0]), np.array([0, 1])) == ([1, 2], [2, 4])


def test_letters_stand_on_a_grid_in_order_and_no_text_that_fits_is_broken():
    words = ["one ", "two ", "three ", "four"]
    runs = lay_out(words, 9)
    assert [(run.line, run.column, run.width, run.text) for run in runs] == [
        (0, 0, 4, "one "), (0, 4, 4, "two "), (1, 0, 6, "three "), (2, 0, 4, "four")
    ]  # fmt: skip
    assert [(run.line, run.text) for run in lay_out(["abcdefgh"], 3)] == [(0, "abc"), (1, "def"), (2, "gh")]


def test_line_ends_tabs_wide_letters_and_marks_take_their_place():
    runs = lay_out(["a\n", "\tb", "中e\u0301", "\x07"], 20)
    assert [(run.line, run.column, run.width, run.owner) for run in runs] == [
        (0, 0, 2, 0), (1, 0, 4, 1), (1, 4, 1, 1), (1, 5, 2, 2), (1, 7, 1, 2), (1, 8, 1, 3)
    ]  # fmt: skip
    assert runs[0].text == "a\u21b5"
    assert runs[4].text == "e\u0301"
    assert runs[5].text in ("\u2407", "\u25a1"), "a picture of it, or a box where no font has one"


def test_the_picture_of_tokens_shows_what_no_font_has_and_reads_no_formulas():
    found = pixels(
        draw_tokens(NAMES, [conversation_of(["$x_1$", "\U0001f600", ""], [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])])
    )
    assert len(np.unique(found.reshape(-1, found.shape[2]), axis=0)) > 10


def test_a_long_response_is_cut_and_its_rest_counted():
    short, long = [conversation_of(["a\n"] * count, [[0.9, 0.1]] * count) for count in (5, MOST_LINES + 7)]
    heights = [len(pixels(draw_tokens(NAMES, [own]))) for own in (short, long)]
    lines = [draw_tokens(NAMES, [own]).axes[0].get_ylim()[0] for own in (short, long)]
    assert lines[1] - lines[0] == MOST_LINES - 5 + 1
    assert heights[1] > heights[0]
    assert "(7 more tokens)" in _words(draw_tokens(NAMES, [long]))
    assert pixels(draw_tokens(NAMES, [short])).shape[1] == pytest.approx(9 * NUM_COLUMNS + 0.4 * DPI, abs=1)


def _words(figure):
    """Texts of the picture, the words of a line joined."""
    lines: dict[float, str] = {}
    for text in figure.axes[0].texts:
        height = text.get_position()[1]
        lines[height] = lines.get(height, "") + text.get_text()
    return lines.values()
