"""The data card: what Hugging Face `datasets` needs to load the folder, and what readers need to know."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def render_card(
    license_name: str | None,
    structure: Mapping[str, Any],
    tables: Mapping[str, str],
    dropped: Mapping[str, Mapping[str, int]],
    test_sets: Sequence[str],
) -> str:
    """README.md of a data set.

    Args:
        license_name: as the hub spells it.
        structure: the run's settings.
        tables: statistics by split.
        dropped: numbers of conversations left out, by domain and reason.
        test_sets: what it was decontaminated against.
    """
    files = [{"split": split, "path": f"data/{split}.jsonl.gz"} for split in tables]
    front: dict[str, Any] = {
        "configs": [{"config_name": "default", "data_files": files}],
        "task_categories": ["text-generation"],
        "tags": ["synthetic"],
    }
    if license_name is not None:
        front["license"] = license_name
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# Instructions for {_listed(structure['domains'])}",
        _ORIGIN.format(
            share=100 * structure["complex_share"], strong=structure["strong"], weak=structure["weak"],
            turns=f", with up to {structure['turns']} further turns" if structure["turns"] else "",
        ),
        *(f"## {split.capitalize()}\n\n{table}" for split, table in tables.items()),
        "## What was left out\n\n" + _dropped(dropped),
        "## Test sets\n\n" + _test_sets(test_sets),
        _FIELDS,
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


_ORIGIN = """\
Written by a language model, by `ultrafuser data`: meta-topics of each domain, sub-topics of each meta-topic,
instructions on each sub-topic, {strong} strongly and {weak} weakly related ones to each, {share:.0f} % of all
rewritten to be more complex, and responses{turns}. Nobody has checked that what it says is true. The method is that
of UltraChat 2 ([arXiv 2403.08281](https://arxiv.org/abs/2403.08281)); no text of that data set is in here."""

_FIELDS = """\
## Fields

`id`, `domain`, `messages` (`role`, `content`); `meta_topic` and `sub_topic` by name; `relation` to the instruction it
was made from (`strong`, `weak`, or empty); `is_complex`: rewritten; `model`: who wrote the last response."""


def _dropped(dropped: Mapping[str, Mapping[str, int]]) -> str:
    if not dropped:
        return "Nothing."
    lines = [f"- {domain}, {reason}: {number:,}" for domain, own in dropped.items() for reason, number in own.items()]
    return "\n".join(sorted(lines))


def _test_sets(test_sets: Sequence[str]) -> str:
    if not test_sets:
        return "The data were held against no test set."
    names = "\n".join(f"- {name}" for name in test_sets)
    return f"No message shares a run of 13 words with a text of these; what did was left out:\n\n{names}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
