"""What a fusion is held against: its models as one set of weights, by averaging or task arithmetic, and their base.

Every one of them is an ordinary model folder in the cache, read in the leader's chat template. Knows models and the
cache; does not know losses.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ultrafuser.gating.model.cache import Artifact, Report, Tick, build_once
from ultrafuser.gating.model.loading import identify
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.gating.model.packaged import hidden_bars
from ultrafuser.gating.model.schema import FusionConfig, SpecialistConfig

AVERAGE = "average"
BASE = "base"
TASK_ARITHMETIC = "task_arithmetic"

# Part of the cache key: raise it when the same models are to give other weights.
_RECIPE = 1


class MergeError(ValueError):
    """Models cannot be merged, or there is no base: a note in the place of the result."""


Term = tuple[float, SpecialistConfig]
"""One model of a linear combination of weights, and its factor. Prepared: a folder or a hub id, no adapter."""


def find_variants(
    loaded: FusionConfig,
    prepared: FusionConfig,
    num_shared_ids: int,
    *,
    base: str | None,
    scale: float,
    cache_dir: Path,
    on_progress: Report,
) -> tuple[list[SpecialistConfig], tuple[str, ...]]:
    """Base, average (model soups, arXiv 2203.05482) and task arithmetic (arXiv 2212.04089), as prepared models.

    Args:
        loaded: the fusion as its file has it.
        prepared: the same with plain model folders.
        num_shared_ids: ids that mean the same token in every model; merged models have no others.
        base: a folder or hub id; default: the model that all specialists name, each with its adapter or none.
        scale: of task arithmetic: base + scale x sum over s of (weights of s - base).
        cache_dir: where merged models are kept.
        on_progress: told what is being done.

    Returns:
        Those that can be had, each under its name; and one line for those that cannot.
    """
    models = prepared.specialists
    combine = partial(_combine, models[0], num_shared_ids, cache_dir, on_progress)
    found, notes = [], []
    try:
        found.append(_find_base(loaded, base, cache_dir, on_progress))
    except MergeError as error:
        notes.append(f"no rows {BASE} and {TASK_ARITHMETIC}: {error}")
    try:
        found.append(combine(AVERAGE, [(1 / len(models), model) for model in models]))
        if len(found) > 1:
            terms = [(1 - scale * len(models), found[0]), *((scale, model) for model in models)]
            found.append(combine(TASK_ARITHMETIC, terms))
    except MergeError as error:
        notes.append(f"no merged weights: {error}")
    return found, tuple(notes)


def _find_base(loaded: FusionConfig, base: str | None, cache_dir: Path, on_progress: Report | None) -> SpecialistConfig:
    leader = loaded.specialists[0]
    named = {(item.model, item.revision) for item in loaded.specialists}
    if base is None and len(named) > 1:
        raise MergeError("the specialists name different models; give the one they were made from as --base")
    changes: dict[str, Any] = {"name": BASE, "adapter": None}
    if base is not None:
        changes |= {"model": base, "revision": None}
    alone = loaded.alone(leader.model_copy(update=changes))
    return materialize(alone, cache_dir, on_progress).specialists[0]


def _combine(
    leader: SpecialistConfig,
    num_shared_ids: int,
    cache_dir: Path,
    on_progress: Report,
    name: str,
    terms: Sequence[Term],
) -> SpecialistConfig:
    artifact = Artifact(
        name=name,
        label=f"merging weights: {name.replace('_', ' ')}",
        parts={
            "recipe": _RECIPE,
            "terms": [[factor, identify(model)] for factor, model in terms],
            "num_shared_ids": num_shared_ids,
        },
        build=partial(_write, terms, num_shared_ids),
    )
    folder = build_once(artifact, cache_dir, on_progress)
    changes = {"name": name, "model": str(folder), "revision": None, "quantization": None}
    return leader.model_copy(update=changes)


def _write(terms: Sequence[Term], num_shared_ids: int, folder: Path, tick: Tick) -> None:
    """Sums in float32, with two models in memory at a time."""
    from transformers import AutoTokenizer

    (first_factor, first), *others = terms
    with hidden_bars():
        total = _load(first, num_shared_ids)
        sums = {name: tensor.mul_(first_factor) for name, tensor in _weights(total).items()}
        for number, (factor, model) in enumerate(others, start=1):
            tick(number / len(terms))
            own = _weights(_load(model, num_shared_ids))
            if unlike := _shapes(sums) ^ _shapes(own):
                raise MergeError(f"the models' weights have different shapes ({min(unlike)[0]})")
            for name, tensor in own.items():
                sums[name].add_(tensor, alpha=factor)
        total.save_pretrained(folder)
    AutoTokenizer.from_pretrained(first.model, revision=first.revision).save_pretrained(folder)


def _load(model: SpecialistConfig, num_shared_ids: int) -> Any:
    """In float32, with rows for the shared ids only: the others mean different tokens in different models."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model.model, revision=model.revision, dtype=torch.float32)
    if loaded.get_input_embeddings().num_embeddings != num_shared_ids:
        loaded.resize_token_embeddings(num_shared_ids)
    return loaded


def _weights(model: Any) -> dict[str, Any]:
    """Parameters by name, a tied one once."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


def _shapes(weights: dict[str, Any]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in weights.items()}
