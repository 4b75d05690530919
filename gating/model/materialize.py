"""Makes every specialist of a fusion a plain model folder: dequantises the packaged model, takes the text part of one
that sees, merges adapters; each once.

What it makes stays in a cache (`gating/model/cache.py`) and is shared by all fusions that use it. Knows models and
adapters; does not know engines, and reads no environment: the caller names the cache's folder.
"""

from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.cache import Artifact, Report, Tick, build_once, cache_folder, fingerprint
from ultrafuser.gating.model.inspection import check_weights
from ultrafuser.gating.model.packaged import PackagedModelError, hidden_bars, packaged_model
from ultrafuser.gating.model.schema import PACKAGE_SCHEME, FusionConfig, SpecialistConfig
from ultrafuser.gating.model.text_part import text_part
from ultrafuser.gating.progress_bar import StepProgress

# Part of the cache key: raise it when the same model and adapter are to give another folder.
_MERGE_RECIPE = 1


def materialize(config: FusionConfig, cache_dir: Path | None = None, on_progress: Report | None = None) -> FusionConfig:
    """The same fusion with nothing left to prepare: each model a folder or a hub id, and no adapters.

    Args:
        config: a loaded fusion; it is not changed.
        cache_dir: where prepared models are kept; default ~/.cache/ultrafuser.
        on_progress: called with the step under way and the share of all steps done (0 to 1). Default: a progress bar
            on stderr. Not called when everything is in the cache.

    Raises:
        FusionError: a package that is missing, an adapter that is missing or does not fit its model, a cache that
            cannot be written.
    """
    cache_dir = cache_folder(cache_dir)
    recipes = [recipe_of(item, f"specialists.{index}", cache_dir) for index, item in enumerate(config.specialists)]
    _build_missing([artifact for recipe in recipes for artifact in recipe], cache_dir, on_progress)
    specialists = [
        as_prepared(item, recipe, cache_dir) for item, recipe in zip(config.specialists, recipes, strict=True)
    ]
    return config.model_copy(update={"specialists": tuple(specialists)})


def as_prepared(specialist: SpecialistConfig, recipe: Sequence[Artifact], cache_dir: Path) -> SpecialistConfig:
    """The specialist once its recipe is built."""
    return specialist.model_copy(update=_prepared(recipe[-1].folder(cache_dir))) if recipe else specialist


def _prepared(folder: Path) -> dict[str, str | None]:
    return {"model": str(folder), "revision": None, "adapter": None}


def recipe_of(specialist: SpecialistConfig, key: str, cache_dir: Path) -> list[Artifact]:
    """What has to be built for one specialist, in order; the last one is what it becomes. Nothing for a plain model.

    `key` is of the fusion file.

    Raises:
        FusionError: a package or an adapter that is missing, a model that no adapter can be merged into.
    """
    recipe = []
    if specialist.model.startswith(PACKAGE_SCHEME):
        try:
            recipe.append(packaged_model(specialist.model.removeprefix(PACKAGE_SCHEME)))
        except PackagedModelError as error:
            raise FusionError(f"{key}.model: {error}") from error
    elif (part := text_part(specialist.model, specialist.revision, f"{key}.model")) is not None:
        recipe.append(part)
    if specialist.adapter is not None:
        recipe.append(_merged(specialist, key, recipe[0] if recipe else None, cache_dir))
    return recipe


def _merged(specialist: SpecialistConfig, key: str, base: Artifact | None, cache_dir: Path) -> Artifact:
    adapter = _adapter_folder(specialist, f"{key}.adapter")
    if base is not None:
        identity: object = base.key
        prepared = specialist.model_copy(update=_prepared(base.folder(cache_dir)))
    else:
        identity = _model_identity(specialist, key)
        prepared = specialist
    return Artifact(
        name=f"{base.name if base else Path(specialist.model).name}-{adapter.name}",
        label=f"merging adapter {adapter.name} of {specialist.name}",
        parts={"recipe": _MERGE_RECIPE, "model": identity, "adapter": fingerprint(adapter)},
        build=partial(_merge, prepared, adapter, f"{key}.adapter"),
    )


def _adapter_folder(specialist: SpecialistConfig, key: str) -> Path:
    assert specialist.adapter is not None
    folder = Path(specialist.adapter)
    if not folder.is_dir():
        # Imported late, here and below: these take seconds that a start with a filled cache should not.
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(specialist.adapter))
        except (OSError, ValueError) as error:
            raise FusionError(f"{key}: no adapter at {specialist.adapter!r}; correct the folder or id") from error
    if not (folder / "adapter_config.json").is_file():
        raise FusionError(f"{key}: {folder} has no adapter_config.json; name the folder that peft saved")
    check_weights(folder, key)
    return folder


def _model_identity(specialist: SpecialistConfig, key: str) -> object:
    """What the model's content depends on: its files, or the commit on the hub."""
    from transformers import AutoConfig

    try:
        model_config = AutoConfig.from_pretrained(specialist.model, revision=specialist.revision)
    except (OSError, ValueError, KeyError) as error:
        raise FusionError(
            f"{key}.model: no model at {specialist.model!r}; correct the folder, id or revision"
        ) from error
    if getattr(model_config, "quantization_config", None) is not None:
        raise FusionError(f"{key}.adapter: {specialist.model} is quantised; name the model it was quantised from")
    folder = Path(specialist.model)
    check_weights(folder, f"{key}.model")
    return fingerprint(folder) if folder.is_dir() else [specialist.model, model_config._commit_hash]


def _merge(specialist: SpecialistConfig, adapter: Path, key: str, folder: Path, tick: Tick) -> None:
    """Write model plus adapter, in the model's own type, as a plain model folder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with hidden_bars():
        model = AutoModelForCausalLM.from_pretrained(specialist.model, revision=specialist.revision, dtype="auto")
        tick(0.3)
        try:
            _check_places(adapter, model)
            merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise FusionError(
                f"{key}: does not fit {specialist.model} ({reason}); name an adapter made for it"
            ) from error
        tick(0.7)
        merged.save_pretrained(folder)
    AutoTokenizer.from_pretrained(specialist.model, revision=specialist.revision).save_pretrained(folder)


def _check_places(adapter: Path, model: Any) -> None:
    """Peft passes over weights that the model has no place for, such as those of an adapter for a model that sees.

    Raises:
        ValueError: there are some.
    """
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        return
    places = {name for name, _ in model.named_modules()}
    with safe_open(str(path), framework="np") as weights:
        names = [name.removeprefix("base_model.model.") for name in weights.keys() if ".lora_" in name]  # noqa: SIM118
    if unknown := sorted({name.partition(".lora_")[0] for name in names} - places):
        raise ValueError(f"it changes {unknown[0]}, which the model has not")


def _build_missing(artifacts: Sequence[Artifact], cache_dir: Path, on_progress: Report | None) -> None:
    # By folder: specialists with the same model and no adapter share one.
    missing = {item.folder(cache_dir): item for item in artifacts if not item.is_built(cache_dir)}
    if not missing:
        return
    with closing(StepProgress()) if on_progress is None else nullcontext(on_progress) as report:
        for index, artifact in enumerate(missing.values()):
            try:
                build_once(artifact, cache_dir, partial(_report_part, report, index, len(missing)))
            except (OSError, SafetensorError) as error:  # a full disk, a folder without the right to write
                if isinstance(error, OSError) and error.errno is None:
                    raise  # not the disk's
                way_out = f"make room in {cache_dir}, or name another folder with --cache"
                raise FusionError(f"{artifact.label}: cannot be written ({error}); {way_out}") from error
        report("models ready", 1.0)


def _report_part(report: Report, index: int, count: int, label: str, share: float) -> None:
    report(label, (index + share) / count)
