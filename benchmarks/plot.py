"""A bar chart of comparisons as PNG: one pair of bars per case, the ratio above. Needs no display."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Comparison, Measured

FUSED_COLOUR, BASELINE_COLOUR = "#1f6f8b", "#c9c9c9"
BAR_WIDTH = 0.38
LABEL_WIDTH = 14
"""Characters per line below a pair of bars."""


def plot_comparisons(comparisons: Sequence[Comparison], fused: str, baseline: str, path: Path) -> None:
    """Draw the comparisons, one chart per unit, side by side; `fused` and `baseline` name the two sides."""
    # Imported here: it takes a second, and reading results does not need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    units = list(dict.fromkeys(item.unit for item in comparisons))
    widths = [max(sum(item.unit == unit for item in comparisons), 1.5) for unit in units]
    figure = Figure(figsize=(1.6 * sum(widths) + 1.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    charts = figure.subplots(1, len(units), squeeze=False, width_ratios=widths)[0]
    for chart, unit in zip(charts, units, strict=True):
        _draw(chart, [item for item in comparisons if item.unit == unit], unit)
    sides = [Patch(color=FUSED_COLOUR), Patch(color=BASELINE_COLOUR)]
    figure.legend(sides, [fused, baseline], loc="outside upper left", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def _draw(chart: object, comparisons: Sequence[Comparison], unit: str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(chart, Axes)
    for index, item in enumerate(comparisons):
        fused, baseline = _height(item.fused), _height(item.baseline)
        chart.bar(index - BAR_WIDTH / 2, fused, BAR_WIDTH, color=FUSED_COLOUR)
        chart.bar(index + BAR_WIDTH / 2, baseline, BAR_WIDTH, color=BASELINE_COLOUR)
        if item.ratio is not None:
            chart.annotate(
                f"{item.ratio:.2f}", (index, max(fused, baseline)), (0, 3), textcoords="offset points", ha="center"
            )
    chart.set_xticks(range(len(comparisons)), [textwrap.fill(item.case, LABEL_WIDTH) for item in comparisons])
    chart.set_ylabel(unit)
    chart.margins(y=0.12)
    chart.spines[["top", "right"]].set_visible(False)


def _height(measured: Measured | None) -> float:
    return measured.value if measured else 0.0
