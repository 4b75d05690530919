"""What a fusion is made of, and which of it is not here: packages, models, adapters, gate, tokenizers, parsers.

Looks into folders and the hub's cache; asks no network, prepares nothing, reads no weights. Knows no engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from ultrafuser.gating.errors import FusionError, GateError
from ultrafuser.gating.model.cache import Artifact
from ultrafuser.gating.model.fusion import FusionConfig, SpecialistConfig, inspect_fusion
from ultrafuser.gating.model.gate_file import check_gate, gate_kind
from ultrafuser.gating.model.inspection import check_model_folder
from ultrafuser.gating.model.materialize import as_prepared, recipe_of
from ultrafuser.gating.model.schema import FRESH_GATE, PACKAGE_SCHEME
from ultrafuser.server.doctor.finding import Finding
from ultrafuser.server.doctor.needed_memory import ModelShape, shape_of, shape_of_package
from ultrafuser.server.settings import TOOL_PARSERS

_TOKENIZER_PACKAGES = {"*.tiktoken": "tiktoken", "*.model": "sentencepiece"}
"""What reads a tokenizer of which there is no `tokenizer.json`, by its file."""


@dataclass(frozen=True)
class Ingredient:
    """One specialist as it is here."""

    name: str
    model: str
    adapter: str | None

    state: str
    """"here", "prepared", "prepared by the first start", or "missing"."""

    shape: ModelShape | None
    """None of a model that is missing."""


@dataclass(frozen=True)
class Ingredients:
    """What a fusion is made of."""

    specialists: tuple[Ingredient, ...]
    gate: str
    """Its kind and file, or that it is missing."""

    max_model_len: int | None
    """Longest prompt plus response, in tokens; None while a model is missing."""

    to_prepare: tuple[str, ...]
    """What the first start will do, once."""

    prepared_bytes: int
    """What that will take in the cache."""

    findings: tuple[Finding, ...]


class _Specialist:
    """One of them, while it is looked at."""

    def __init__(self, config: SpecialistConfig, key: str, cache_dir: Path) -> None:
        self.config = config
        self._key = key
        self._cache_dir = cache_dir
        self.findings: list[Finding] = []
        self.recipe: list[Artifact] = []
        self.shape: ModelShape | None = None
        self._is_packaged = config.model.startswith(PACKAGE_SCHEME)
        try:
            self._look()
        except ValueError as error:
            self.findings.append(Finding.of(error))

    def _look(self) -> None:
        config, key = self.config, self._key
        folder = None if self._is_packaged else self._found(config.model, config.revision, "model", "config.json")
        if config.adapter is not None:
            self._found(config.adapter, None, "adapter", "adapter_config.json")
        if folder is not None:
            self.findings += [
                Finding(f"{key}.model: its tokenizer needs {package}, which is not installed", f"pip install {package}")
                for package in tokenizer_packages(folder)
                if find_spec(package) is None
            ]
        if self.findings:
            return
        self.recipe = recipe_of(config, key, self._cache_dir)
        if folder is None and not self.is_prepared:
            self.shape = shape_of_package()
        else:
            self.shape = shape_of(self.recipe[-1].folder(self._cache_dir) if self.is_prepared else folder or Path())

    def _found(self, source: str, revision: str | None, what: str, config_name: str) -> Path | None:
        """The folder of a model or adapter that is here and whole."""
        key, folder = f"{self._key}.{what}", Path(source)
        if folder.is_absolute():
            check_model_folder(folder, key, config_name)
            return folder
        command = f"hf download {source}" + (f" --revision {revision}" if revision else "")
        snapshot = cached_snapshot(source, revision, config_name)
        if snapshot is None:
            self.findings.append(Finding(f"{key}: {source} is not in the hub's cache", command))
            return None
        try:
            check_model_folder(snapshot, key, config_name)
        except FusionError as error:
            self.findings.append(replace(Finding.of(error), way_out=command))
            return None
        return snapshot

    @property
    def to_build(self) -> list[Artifact]:
        return [artifact for artifact in self.recipe if not artifact.is_built(self._cache_dir)]

    @property
    def is_prepared(self) -> bool:
        return bool(self.recipe) and self.recipe[-1].is_built(self._cache_dir)

    @property
    def told(self) -> Ingredient:
        config, state = self.config, "missing" if self.findings else "here"
        if self.recipe:
            state = "prepared" if self.is_prepared else "prepared by the first start"
        return Ingredient(config.name, config.model, config.adapter, state, self.shape)

    @property
    def as_looked_at(self) -> SpecialistConfig | None:
        """As `inspect_fusion` can look at it: prepared, or without an adapter that is not merged yet; None: not yet."""
        if not self.recipe or self.is_prepared:
            return as_prepared(self.config, self.recipe, self._cache_dir)
        is_plain = not self._is_packaged and len(self.recipe) == 1 and self.config.adapter is not None
        return self.config.model_copy(update={"adapter": None}) if is_plain else None


def look_into(fusion: FusionConfig, shown: str, cache_dir: Path) -> Ingredients:
    """Everything that a fusion needs here; `shown` is how the user named it, `cache_dir` where prepared models are."""
    looked = [_Specialist(item, f"specialists.{index}", cache_dir) for index, item in enumerate(fusion.specialists)]
    findings = [finding for one in looked for finding in one.findings]
    gate, missing_gate = _gate(fusion, shown)
    findings += missing_gate
    max_model_len = fusion.engine.max_model_len
    if not findings:
        shapes = [one.shape for one in looked if one.shape is not None]
        max_model_len = max_model_len or min(shape.max_positions for shape in shapes)
        findings += _misfits(fusion, [one.as_looked_at for one in looked])
    if (parser := fusion.tool_call_parser) is not None and parser not in TOOL_PARSERS:
        findings.append(
            Finding(f"tool_call_parser: {parser!r} is not supported", f"choose one of {', '.join(TOOL_PARSERS)}")
        )
    folders: dict[Path, tuple[str, int]] = {}
    for one in looked:
        size = one.shape.stored_bytes if one.shape else 0
        folders |= {artifact.folder(cache_dir): (artifact.label, size) for artifact in one.to_build}
    return Ingredients(
        tuple(one.told for one in looked),
        gate,
        max_model_len,
        tuple(label for label, _ in folders.values()),
        sum(size for _, size in folders.values()),
        tuple(dict.fromkeys(findings)),
    )


def cached_snapshot(model: str, revision: str | None, config_name: str) -> Path | None:
    """The folder of the hub's cache that has a model's configuration; None: it is not here."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, config_name, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def tokenizer_packages(folder: Path) -> list[str]:
    """Packages that read a model's tokenizer, none for one that is ready to use."""
    if (folder / "tokenizer.json").is_file():
        return []
    return [package for pattern, package in _TOKENIZER_PACKAGES.items() if any(folder.glob(pattern))]


def _gate(fusion: FusionConfig, shown: str) -> tuple[str, list[Finding]]:
    """What the gate is, in words; what is wrong with its file."""
    gate = fusion.gate
    if gate is None:
        return "none, for one specialist", []
    if gate == FRESH_GATE:
        return "untrained (package:fresh)", []
    if not gate.startswith(PACKAGE_SCHEME) and not Path(gate).is_file():
        train = f"ultrafuser train {shown} --data DOMAIN=FILE --output FOLDER --stage 1"
        way_out = f"{train}; then serve FOLDER. Or set `gate: {FRESH_GATE}`, an untrained one"
        return "missing", [Finding(f"gate: no such file {gate}", way_out)]
    try:
        check_gate(gate, fusion.specialist_names, None)
        return f"{gate_kind(gate)}, {gate}", []
    except GateError as error:
        return "unfit", [Finding.of(error)]


def _misfits(fusion: FusionConfig, specialists: Sequence[SpecialistConfig | None]) -> list[Finding]:
    """What the start would refuse; nothing can be told yet of models that the first start makes."""
    ready = tuple(one for one in specialists if one is not None)
    if len(ready) < len(specialists):
        return []
    try:
        inspect_fusion(fusion.model_copy(update={"specialists": ready}))
    except FusionError as error:
        return [Finding.of(error)]
    except ImportError as error:  # Transformers names the package that a tokenizer needs
        return [Finding(f"tokenizer: {' '.join(str(error).split())}", "install the package that it names")]
    return []
