"""The summary of a gate as JSON values and as Markdown tables. Knows summaries; does not know how they were taken."""

from collections.abc import Mapping, Sequence
from typing import Any

from ultrafuser.gating.analysis.weights import INTERVAL, DomainSummary, Estimate


def as_json(fusion: str, summaries: Mapping[str, DomainSummary]) -> dict[str, Any]:
    """Everything in the summaries; intervals are null for a domain with a single conversation."""
    domains = {
        domain: {
            "conversations": own.num_conversations,
            "tokens": own.num_tokens,
            "weights": {name: _values(estimate) for name, estimate in own.weights.items()},
            "leads": {name: _values(estimate) for name, estimate in own.leads.items()},
            "entropy_nats": _values(own.entropy),
            "effective_specialists": _values(own.num_effective),
        }
        for domain, own in summaries.items()
    }
    return {"fusion": fusion, "interval": INTERVAL, "domains": domains}


def as_markdown(fusion: str, summaries: Mapping[str, DomainSummary]) -> str:
    """Three tables: weights, leads, entropy."""
    specialists = list(next(iter(summaries.values())).weights)
    weights = [[domain, *map(str, own.weights.values())] for domain, own in summaries.items()]
    leads = [[domain, *map(str, own.leads.values())] for domain, own in summaries.items()]
    entropy = [
        [domain, str(own.entropy), str(own.num_effective), f"{own.num_conversations:,}", f"{own.num_tokens:,}"]
        for domain, own in summaries.items()
    ]
    lines = [
        f"# Gate weights of {_cell(fusion)}",
        "",
        f"Means over response tokens, read teacher-forced; in brackets: {INTERVAL}.",
        "",
        "## Mean weight of each specialist",
        "",
        *_table(["data", *specialists], weights),
        "",
        "## Share of tokens that each specialist leads",
        "",
        *_table(["data", *specialists], leads),
        "",
        "## Entropy of the weights",
        "",
        *_table(["data", "nats", "effective specialists", "conversations", "tokens"], entropy),
    ]
    return "\n".join(lines) + "\n"


def _values(estimate: Estimate) -> dict[str, float | None]:
    low, high = estimate.interval or (None, None)
    return {"mean": estimate.mean, "low": low, "high": high}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells padded, so that it can be read as it is."""
    cells = [[_cell(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
