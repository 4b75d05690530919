"""Pictures of a gate's weights: one column per conversation (paper: Figure 6), and the entropy of the weights.

Knows readings; the figures need no display. Shape suffixes as in `weights.py`.
"""

import io
import math
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ultrafuser.gating.analysis.styles import style_of
from ultrafuser.gating.analysis.weights import Floats, GateReading

DPI = 130
HEATMAP_WIDTH, ENTROPY_SIZE = 11.0, (11.0, 4.2)
"""Inches."""

_NUM_BINS = 30
_FEWEST_RESPONSES = 3
"""Responses that must reach a position for it to be drawn, if there are as many."""


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def draw_heatmap(reading: GateReading) -> Figure:
    """Mean weights of every conversation; within a domain by falling weight of the domain's largest specialist."""
    num_specialists = len(reading.specialists)
    counts = [len(rows) for rows in reading.domains.values()]
    figure = Figure(figsize=(HEATMAP_WIDTH, 1.6 + 0.5 * num_specialists), layout="constrained")
    # A domain with few conversations keeps room for its name.
    widths = [max(count, 0.12 * sum(counts)) for count in counts]
    charts = figure.subplots(1, len(counts), squeeze=False, sharey=True, width_ratios=widths)[0]
    means = reading.conversation_means()
    for chart, (domain, rows) in zip(charts, reading.domains.items(), strict=True):
        image = _draw_domain(chart, domain, means[:, list(rows)])
    charts[0].set_yticks(range(num_specialists), reading.specialists)
    charts[0].set_ylabel("specialist")
    figure.supxlabel("conversations, by falling weight of their domain's largest specialist", fontsize="medium")
    figure.colorbar(image, ax=charts, label="mean weight", pad=0.01, fraction=0.04)
    return figure


def draw_entropy(reading: GateReading) -> Figure:
    """How the entropy is distributed over tokens, and its mean by position in the response, for every domain."""
    figure = Figure(figsize=ENTROPY_SIZE, layout="constrained")
    spread, course = figure.subplots(1, 2)
    largest = math.log(len(reading.specialists))
    bins = np.linspace(0, largest, _NUM_BINS + 1)
    for index, domain in enumerate(reading.domains):
        style = style_of(index)
        look = {"color": style.colour, "linestyle": style.plot_line, "label": domain, "linewidth": 1.8}
        tokens = reading.tokens_of(domain)
        # Rounding may lead a little beyond equal weights.
        values = np.minimum(reading.entropy_N[tokens], largest)
        counts, _ = np.histogram(values, bins)
        spread.stairs(counts / len(values), bins, **look)
        positions, means = mean_by_position(values, reading.positions_N[tokens])
        course.plot(positions, means, **look)
    spread.set(xlabel="entropy of the weights (nats)", ylabel="share of tokens", xlim=(0, largest))
    course.set(xlabel="position in the response (tokens)", ylabel="mean entropy (nats)", xscale="log")
    course.set_ylim(0, largest * 1.04)
    course.axhline(largest, color="0.4", linewidth=1)
    course.annotate("equal weights", (0.99, largest), (0, -3), course.get_yaxis_transform(), "offset points",
                    ha="right", va="top", color="0.3", fontsize="small")  # fmt: skip
    course.xaxis.set_major_formatter("{x:g}")
    for chart in (spread, course):
        chart.spines[["top", "right"]].set_visible(False)
    handles, labels = spread.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)
    return figure


def mean_by_position(values_N: Floats, positions_N: np.ndarray) -> tuple[list[float], list[float]]:
    """Means of values over bins of positions that widen with the position (a fifth at a time).

    Returns:
        The bins' middles, counted from 1, and the means; positions that fewer than three responses reach are left out,
        unless there are fewer.
    """
    num_reaching = np.bincount(positions_N)
    shown = num_reaching >= min(_FEWEST_RESPONSES, num_reaching[0])
    end = len(shown) if shown.all() else int(np.argmin(shown))
    edges = [1]
    while edges[-1] <= end:
        edges.append(max(edges[-1] + 1, round(edges[-1] * 1.2)))
    edges[-1] = end + 1
    middles, means = [], []
    for first, beyond in pairwise(edges):
        inside = (positions_N + 1 >= first) & (positions_N + 1 < beyond)
        middles.append((first + beyond - 1) / 2)
        means.append(float(values_N[inside].mean()))
    return middles, means


def _draw_domain(chart: Axes, domain: str, means_SR: Floats) -> AxesImage:
    order = np.argsort(-means_SR[means_SR.mean(axis=1).argmax()], kind="stable")
    image = chart.imshow(means_SR[:, order], cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    chart.set_title(f"{domain} ({means_SR.shape[1]})", fontsize="medium")
    chart.set_xticks([])
    chart.tick_params(left=False)
    chart.spines[:].set_visible(False)
    # Lines between specialists, so that columns are not read as one block.
    for row in range(1, len(means_SR)):
        chart.axhline(row - 0.5, color="white", linewidth=1.5)
    return image
