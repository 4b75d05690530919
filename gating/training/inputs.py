"""What a training run starts from: the fusion with its models prepared, and the rows to train and evaluate on.

Nothing here loads a weight. Knows fusions, files and the cache; does not know learners and trainers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ultrafuser.gating.data.encoded_rows import Rows, load_rows, select
from ultrafuser.gating.data.encoding import make_encoder, resolve_max_length
from ultrafuser.gating.data.hub import open_data
from ultrafuser.gating.errors import TrainError
from ultrafuser.gating.model.cache import Report, cache_folder
from ultrafuser.gating.model.gate_file import gate_kind
from ultrafuser.gating.model.gate_kind import GateKind
from ultrafuser.gating.model.inspection import FusedModelInfo, inspect_fusion, shared_vocabulary
from ultrafuser.gating.model.loading import identify, prepare
from ultrafuser.gating.model.schema import FRESH_GATE, FusionConfig
from ultrafuser.gating.training.newcomer import empty_gate_for_newcomer, naming_the_newcomer, starting_fusion
from ultrafuser.gating.training.settings import TrainSettings


@dataclass(frozen=True)
class RunInputs:
    """Everything a run is made from, checked."""

    settings: TrainSettings

    loaded: FusionConfig
    """The fusion file's content, and a newcomer: what the result is a changed copy of."""

    fusion: FusionConfig
    """What is trained: prepared models; one specialist only if one is trained alone; a gate that exists."""

    info: FusedModelInfo
    """Of `fusion`."""

    rows: Rows

    domains: tuple[str, ...]
    """The domains of a step."""

    eval_rows: dict[str, Rows]
    """To evaluate on, by domain."""

    cache_dir: Path
    """Where prepared things are kept."""

    def micro_batch(self, num_processes: int) -> int:
        """Rows of all domains that one process computes at a time."""
        return self.settings.micro_rows(num_processes) * len(self.domains)

    @property
    def all_rows(self) -> list[Rows]:
        """To train on, then to evaluate on."""
        return [self.rows, *self.eval_rows.values()]

    @property
    def gate_kind(self) -> GateKind:
        """Of the gate that the run begins with: as asked for, else of the one that is there."""
        if self.settings.gate_kind is not None:
            return GateKind.parse(self.settings.gate_kind)
        gate = self.fusion.gate if self.settings.add is None else self.loaded.gate
        return GateKind() if gate is None else gate_kind(gate)

    @property
    def data_digests(self) -> dict[str, str]:
        """SHA-256 of every data file, by name."""
        digests: dict[str, str] = {}
        for rows in self.all_rows:
            for name, digest in rows.digests.items():
                # Files to train and to evaluate on may have the same name.
                is_other = digests.setdefault(name, digest) != digest
                digests |= {f"{name} ({digest[:8]})": digest} if is_other else {}
        return digests

    @property
    def vocabulary(self) -> str:
        """Digest of the tokens that the specialists share."""
        from transformers import AutoTokenizer

        leader = self.fusion.specialists[0]
        tokenizer = AutoTokenizer.from_pretrained(leader.model, revision=leader.revision)
        return shared_vocabulary(tokenizer, self.info.num_shared_ids)

    @property
    def models(self) -> list[Any]:
        """What identifies the models of `fusion`."""
        return [{"name": item.name, **identify(item)} for item in self.fusion.specialists]


def gather_inputs(settings: TrainSettings, on_progress: Report | None = None) -> RunInputs:
    """Load, prepare and check everything that a run needs, but weights.

    Raises:
        FusionError, CommandError: what is wrong with fusion, data or settings.
    """
    cache_dir = cache_folder(settings.cache)
    loaded = starting_fusion(settings)
    chosen = choose(loaded, settings)
    files = open_data(settings.data, cache_dir, settings.limit, on_progress)
    eval_files = open_data(settings.eval_data, cache_dir, settings.eval_limit, on_progress)
    with naming_the_newcomer(settings, chosen):
        fusion = prepare(chosen, cache_dir, keep_adapters=settings.uses_adapters, on_progress=on_progress)
        info = inspect_fusion(fusion)
    if settings.add is not None:
        empty_gate_for_newcomer(loaded, info.hidden_sizes)
    encoder, key = make_encoder(fusion, info, resolve_max_length(settings.max_length, info))
    read = partial(load_rows, encoder=encoder, key=key, cache_dir=cache_dir, on_progress=on_progress)
    rows = read(files, domains=settings.domains)
    domains = tuple(sorted(settings.domains)) or rows.domains
    eval_rows = {}
    if eval_files:
        found = read(eval_files, domains=domains)
        # The same rows whatever the run's seed: runs with several seeds are compared on them.
        eval_rows = {name: select(found, [name], settings.eval_limit, seed=0) for name in domains}
    _check_keys(domains, fusion.specialist_names)
    rows = select(rows, domains, settings.limit, settings.seed)
    return RunInputs(settings, loaded, fusion, info, rows, domains, eval_rows, cache_dir)


def _check_keys(domains: Sequence[str], specialists: Sequence[str]) -> None:
    """The log has one key for the weights of each specialist on each domain, made of both names."""
    pairs: dict[str, tuple[str, str]] = {}
    for pair in product(domains, specialists):
        before = pairs.setdefault("_".join(pair), pair)
        if before != pair:
            raise TrainError(
                f"domain {pair[0]!r}: with specialist {pair[1]!r} it has the name of {before[0]!r} with specialist"
                f" {before[1]!r} in the log; rename one of them"
            )


def choose(loaded: FusionConfig, settings: TrainSettings) -> FusionConfig:
    """The specialists that take part, with a gate file that exists, or a fresh gate."""
    # What learns here would make it a head of another model.
    loaded = loaded.without_draft_head()
    if settings.specialist is not None:
        chosen = [item for item in loaded.specialists if item.name == settings.specialist]
        if not chosen:
            names = ", ".join(loaded.specialist_names)
            raise TrainError(f"--specialist: {settings.specialist!r} is not in the fusion; it has {names}")
        return loaded.alone(*chosen)
    if len(loaded.specialists) < 2 and settings.drafter:
        raise TrainError(
            f"--drafter: {loaded.name} has one specialist; a draft head is trained for two or more and a gate"
        )
    if len(loaded.specialists) < 2:
        raise TrainError(f"--stage: {loaded.name} has one specialist and no gate; use --specialist to train it")
    has_gate = loaded.gate is not None and (loaded.gate == FRESH_GATE or Path(loaded.gate).is_file())
    # The gate that a newcomer joins is for the others: it is looked at, and widened, by itself.
    if settings.add is not None or settings.fresh_gate or (settings.stage == 1 and not has_gate):
        return loaded.model_copy(update={"gate": FRESH_GATE})
    if settings.gate_kind is not None and loaded.gate not in (None, FRESH_GATE):
        kind = gate_kind(str(loaded.gate))
        if str(kind) != settings.gate_kind:
            raise TrainError(
                f"--gate-kind: is {settings.gate_kind}, but {loaded.gate} is of kind {kind}; leave it out, or add"
                " --fresh-gate to start from an untrained gate"
            )
    return loaded
