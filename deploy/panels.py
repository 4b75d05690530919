"""What a dashboard is made of: rows of panels, and the queries that most of them are.

`$instance` is the server chosen at the top of the page, `$__rate_interval` Grafana's own window for rates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    """What is shown."""

    help: str
    """How to read it."""

    unit: str
    """Grafana's name of the unit."""

    queries: Mapping[str, str]
    """PromQL by legend."""

    kind: Literal["timeseries", "stat", "heatmap"] = "timeseries"
    """Grafana's name of the picture."""

    width: int = 8
    """Of 24 columns."""

    is_stacked: bool = False
    """Whether the lines are parts of a whole."""


@dataclass(frozen=True)
class Row:
    """Panels under one title."""

    title: str
    panels: Sequence[Panel]


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """A counter's growth per second, summed over servers, by a label if one is named."""
    grouping = f" by ({by})" if by else ""
    inner = f'{{instance=~"$instance"{", " if labels else ""}{labels}}}'
    return f"sum{grouping} (rate({metric}{inner}[$__rate_interval]))"


def quantile(share: float, metric: str, by: str = "", labels: str = "") -> str:
    """A quantile of a histogram over the rate window, by a label if one is named."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', f'{by}, le' if by else 'le', labels)})"


def mean(metric: str, by: str = "", labels: str = "") -> str:
    """The mean of a histogram over the rate window, by a label if one is named."""
    return f"{rate(f'{metric}_sum', by, labels)} / {rate(f'{metric}_count', by, labels)}"


def quantiles(metric: str) -> dict[str, str]:
    """The three that matter: usual, bad, worst."""
    return {f"p{round(share * 100)}": quantile(share, metric) for share in (0.5, 0.95, 0.99)}
