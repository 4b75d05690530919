"""Pictures of training runs: their losses and mean gate weights over steps, drawn over each other.

Knows what `runs.py` read; the figure needs no display.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ultrafuser.gating.analysis.runs import RunCurves, Series
from ultrafuser.gating.analysis.styles import MARKERS, PALETTE, PLOT_LINES

PANEL_SIZE = (3.9, 2.6)
"""Inches."""

_NUM_MARKERS = 8
"""On a curve."""

_LEGEND_COLUMNS = 4


@dataclass(frozen=True)
class Panel:
    """One chart: curves of all runs."""

    row: int
    column: int
    title: str
    label: str
    """Of the vertical axis."""

    curves: Sequence[tuple[Series, dict[str, Any]]]


def draw_curves(runs: Sequence[RunCurves]) -> Figure:
    """Training loss, losses by domain, mean gate weights by domain; one colour and marker per label."""
    panels = list(_panels(runs))
    legend = _legend(runs)
    num_rows = 1 + max(panel.row for panel in panels)
    num_columns = 1 + max(panel.column for panel in panels)
    legend_height = 0.3 + 0.22 * -(-len(legend) // _LEGEND_COLUMNS)
    size = (max(2, num_columns) * PANEL_SIZE[0], num_rows * PANEL_SIZE[1] + legend_height)
    figure = Figure(figsize=size, layout="constrained")
    charts = figure.subplots(num_rows, num_columns, squeeze=False)
    for panel in panels:
        _draw(charts[panel.row, panel.column], panel)
    for chart in charts.flat:
        if not chart.lines:
            chart.remove()
    figure.legend(handles=legend, loc="outside upper left", ncols=_LEGEND_COLUMNS, frameon=False, handlelength=3)
    return figure


def _panels(runs: Sequence[RunCurves]) -> Iterator[Panel]:
    labels = _labels(runs)
    looks = [_look(labels.index(run.label)) for run in runs]
    domains = list(dict.fromkeys(domain for run in runs for domain in run.domains))
    specialists = _specialists(runs)
    yield Panel(0, 0, "training loss", "nats per token", tuple(zip([run.loss for run in runs], looks, strict=True)))
    if any(len(run.domains) > 1 for run in runs):
        means = tuple(zip([run.eval_loss for run in runs], looks, strict=True))
        yield Panel(0, 1, "evaluation loss, mean of domains", "", means)
    for column, domain in enumerate(domains):
        losses = tuple(zip([run.domains.get(domain, Series()) for run in runs], looks, strict=True))
        yield Panel(1, column, f"evaluation loss, {domain}", "" if column else "nats per token", losses)
        if specialists:
            curves = [
                (run.gate.get(domain, {}).get(name, Series()), {**look, "linestyle": _line(index)})
                for run, look in zip(runs, looks, strict=True)
                for index, name in enumerate(specialists)
            ]
            yield Panel(2, column, f"mean gate weights, {domain}", "" if column else "weight", curves)


def _labels(runs: Sequence[RunCurves]) -> list[str]:
    return list(dict.fromkeys(run.label for run in runs))


def _specialists(runs: Sequence[RunCurves]) -> list[str]:
    """Those that a gate chose between; a specialist that was trained alone had none."""
    chosen = [own for run in runs for own in run.gate.values() if len(own) > 1]
    return list(dict.fromkeys(name for own in chosen for name in own))


def _legend(runs: Sequence[RunCurves]) -> list[Line2D]:
    handles = [Line2D([], [], label=label, **_look(index)) for index, label in enumerate(_labels(runs))]
    for index, name in enumerate(_specialists(runs)):
        handles.append(Line2D([], [], label=f"weight of {name}", color="0.3", linestyle=_line(index)))
    return handles


def _draw(chart: Axes, panel: Panel) -> None:
    for series, look in panel.curves:
        if series.steps:
            every = max(1, len(series.steps) // _NUM_MARKERS)
            chart.plot(series.steps, series.values, **look, markevery=every)
    if panel.title.startswith("mean gate"):
        chart.set_ylim(0, 1)
    chart.set_title(panel.title, fontsize="medium")
    chart.set(xlabel="step", ylabel=panel.label)
    chart.xaxis.set_major_locator(MaxNLocator(integer=True))
    chart.spines[["top", "right"]].set_visible(False)


def _look(index: int) -> dict[str, Any]:
    colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.6}


def _line(index: int) -> Any:
    return PLOT_LINES[index % len(PLOT_LINES)]
