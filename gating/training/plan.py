"""What a run would train, hold in memory and take in steps, worked out from configurations before a weight is loaded.

Numbers are computed, not measured. Knows configurations of models and settings; loads no weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ultrafuser.gating.data.hidden_states import resolve_dtype
from ultrafuser.gating.model.draft_head import DraftHead
from ultrafuser.gating.model.gate import DEFAULT_WIDTH, Gate
from ultrafuser.gating.model.gate_file import check_gate
from ultrafuser.gating.model.inspection import FusedModelInfo
from ultrafuser.gating.model.loading import add_adapter, empty_model
from ultrafuser.gating.model.schema import FRESH_GATE, FusionConfig
from ultrafuser.gating.training.draft_learner import draft_head_config
from ultrafuser.gating.training.inputs import RunInputs
from ultrafuser.gating.training.newcomer import empty_gate_for_newcomer, what_learns
from ultrafuser.gating.training.settings import TrainSettings

_GIB = 1024**3
# float32 master, its gradient, and AdamW's two moments.
_BYTES_PER_TRAINED = 4 + 4 + 8
_FLOAT32 = 4
_KEPT_PER_LAYER = 16
"""Hidden-sized values that a layer keeps of each token for the backward pass, about."""


@dataclass(frozen=True)
class ModelSize:
    """One specialist."""

    name: str
    num_parameters: int
    num_trained: int
    num_output: int
    """Parameters of the output layer."""

    num_outside_layers: int
    """Parameters of no decoder layer: embeddings, final norm, output layer."""

    num_layers: int
    hidden_size: int


def measure(fusion: FusionConfig, settings: TrainSettings) -> list[ModelSize]:
    """Parameters of every specialist, counted on models without memory."""
    sizes = []
    for specialist in fusion.specialists:
        model = empty_model(specialist).requires_grad_(False)
        with torch.device("meta"):
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            num_output = model.get_output_embeddings().weight.numel()
            num_outside = num_parameters - _num_in_layers(model)
            if settings.uses_adapters:
                add_adapter(model, None, **settings.lora)
            elif settings.trains_specialists:
                model.requires_grad_(True)
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        sizes.append(
            ModelSize(
                specialist.name,
                num_parameters,
                num_trained,
                num_output,
                num_outside,
                model.config.num_hidden_layers,
                model.config.hidden_size,
            )
        )
    return sizes


def describe(inputs: RunInputs, device: torch.device, num_processes: int) -> list[str]:
    """The plan of a run on so many devices of this kind, as lines of text. Rows to evaluate on count too: for the
    longest sequence that is held in memory, and for the disk."""
    settings, info = inputs.settings, inputs.info
    sizes = measure(inputs.fusion, settings)
    dtype = resolve_dtype(settings.precision, device)
    rows = {domain: len(inputs.rows.indices(domain)) for domain in inputs.domains}
    datasets = [own.dataset for own in inputs.all_rows]
    micro_batch = inputs.micro_batch(num_processes)
    num_response_tokens = [dataset["num_response_tokens"][:] for dataset in datasets]
    lines = [f"{size.name}: {size.num_parameters:,} parameters, {size.num_trained:,} learn" for size in sizes]
    if settings.drafter:
        memory, gathered = _drafting(inputs, len(sizes), dtype, micro_batch, max(map(max, num_response_tokens)))
        lines.append(f"draft head: {_num_learning(_draft_head(inputs)):,} parameters at most, all learn")
    else:
        num_gate, kind, learning = (_num_gate(inputs) if len(sizes) > 1 else 0), inputs.gate_kind, "all learn"
        if settings.add is not None:
            gate = empty_gate_for_newcomer(inputs.loaded, info.hidden_sizes)
            num_gate, kind, learning = _num_learning(gate), gate.kind, what_learns(gate, settings.newcomer[0])
        lines += [f"gate ({kind}): {num_gate:,} parameters, {learning}"] if num_gate else []
        tokens = micro_batch * max(max(dataset["length"][:]) for dataset in datasets)
        memory = _memory(settings, info, sizes, dtype, num_gate, tokens)
        gathered = _gathered(settings, sizes, dtype)
    return [
        *lines,
        *_steps(settings, rows, num_processes),
        "memory of one process, computed, not measured (FSDP2 divides the first two by the number of processes, but"
        f" gathers {_gib(gathered)} for a step):",
        *(f"  {name}: {_gib(size)}" for name, size in memory.items()),
        *_disk(settings, info, dtype, sum(map(sum, num_response_tokens))),
    ]


def _steps(settings: TrainSettings, rows: Mapping[str, int], num_processes: int) -> list[str]:
    per_step, micro = settings.num_rows_per_domain, settings.micro_rows(num_processes)
    epochs = {name: settings.num_steps * per_step / count for name, count in rows.items()}
    shares = f"{per_step} rows x {len(rows)} domains, {micro} rows of each"
    if settings.sampling == "proportional":
        epochs = dict.fromkeys(rows, settings.num_steps * per_step * len(rows) / sum(rows.values()))
        shares = f"{per_step * len(rows)} rows of all {len(rows)} domains together, {micro * len(rows)} rows"
    return [
        f"steps: {settings.num_steps:,} of {shares} at a time on {num_processes} process(es)",
        *(f"  {name}: {count:,} rows, {epochs[name]:.2f} epochs" for name, count in rows.items()),
    ]


def _memory(
    settings: TrainSettings,
    info: FusedModelInfo,
    sizes: Sequence[ModelSize],
    dtype: torch.dtype,
    num_others: int,
    tokens: int,
) -> dict[str, int]:
    num_trained = sum(size.num_trained for size in sizes) + num_others
    all_parameters = sum(size.num_parameters for size in sizes)
    frozen = sum(size.num_output for size in sizes) if settings.reads_cached_states else all_parameters
    if settings.trains_specialists and not settings.uses_adapters:
        frozen = 0
    logits = 3 * len(sizes) * settings.chunk_size * info.num_shared_ids * 4
    return {
        "frozen weights": frozen * dtype.itemsize,
        "trained weights, gradients and AdamW's moments": num_trained * _BYTES_PER_TRAINED,
        "logits of a chunk of the loss": logits,
        f"activations of {tokens:,} tokens, at most": _activations(settings, sizes, dtype, tokens),
    }


def _drafting(
    inputs: RunInputs, num_specialists: int, dtype: torch.dtype, micro_batch: int, longest: int
) -> tuple[dict[str, int], int]:
    """What a draft head's training holds, and what of it is whole in every process during a step: all weights.

    Counted for rows of one response of `longest` tokens; the shorter ones of rows with several turns are padded.
    """
    settings, info, head = inputs.settings, inputs.info, _draft_head(inputs)
    config, num_learning = head.config, _num_learning(head)
    # What the head learns from: of probabilities, which are shares of all ids, all of them.
    num_mixed_ids = info.num_shared_ids if inputs.gate_kind.probabilities else config.num_draft_ids
    num_frozen = sum(info.hidden_sizes) * num_mixed_ids + info.num_shared_ids * config.size
    frozen = num_frozen * dtype.itemsize + _num_gate(inputs) * _FLOAT32
    # Of each guess its scores, their logarithms and a gradient; of each position its target, mixed of all specialists.
    num_positions = max(1, settings.chunk_size // settings.draft_tokens)
    num_logits = 3 * settings.chunk_size * config.num_draft_ids + (num_specialists + 1) * num_positions * num_mixed_ids
    # Scores, weights and a gradient; a window of positions sees its own and the one before.
    num_pairs = micro_batch * min(config.window, longest) * min(2 * config.window, longest)
    tokens = micro_batch * longest
    kept = (
        settings.draft_tokens * _KEPT_PER_LAYER * config.size * _FLOAT32 + 2 * sum(info.hidden_sizes) * dtype.itemsize
    )
    memory = {
        "frozen weights": frozen,
        "trained weights, gradients and AdamW's moments": num_learning * _BYTES_PER_TRAINED,
        "logits of a chunk of the loss": num_logits * _FLOAT32,
        f"attention of a window of {config.window:,} positions": 3 * num_pairs * config.num_heads * _FLOAT32,
        f"activations of {tokens:,} response tokens": tokens * kept,
    }
    return memory, frozen + 2 * num_learning * _FLOAT32


def _gathered(settings: TrainSettings, sizes: Sequence[ModelSize], dtype: torch.dtype) -> int:
    """What is whole in every process during a step although it is sharded: all but the decoder layers, and its
    gradients if it learns. Decoder layers are gathered one after the other."""
    count = sum(size.num_output if settings.reads_cached_states else size.num_outside_layers for size in sizes)
    learns = settings.trains_specialists and not settings.uses_adapters
    return count * dtype.itemsize * (2 if learns else 1)


def _num_in_layers(model: Any) -> int:
    names = model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())


def _activations(settings: TrainSettings, sizes: Sequence[ModelSize], dtype: torch.dtype, tokens: int) -> int:
    """About 16 hidden-sized values a token and layer are kept for the backward pass (attention by SDPA keeps no
    matrix of scores); one with gradient checkpointing, and those of one layer; without a graph one layer's."""
    per_layer = _KEPT_PER_LAYER
    if not settings.trains_specialists:
        layers = [per_layer for _ in sizes]
    elif settings.gradient_checkpointing:
        layers = [size.num_layers + per_layer for size in sizes]
    else:
        layers = [size.num_layers * per_layer for size in sizes]
    values = [count * size.hidden_size for count, size in zip(layers, sizes, strict=True)]
    return tokens * dtype.itemsize * (sum(values) if settings.trains_specialists else max(values))


def _disk(settings: TrainSettings, info: FusedModelInfo, dtype: torch.dtype, response_tokens: int) -> list[str]:
    if not settings.reads_cached_states:
        return []
    num_bytes = response_tokens * sum(info.hidden_sizes) * dtype.itemsize
    return [f"disk for cached hidden states: {_gib(num_bytes)} (one specialist is in memory while they are computed)"]


def _num_gate(inputs: RunInputs) -> int:
    with torch.device("meta"):
        return _num_learning(_gate(inputs))


def _gate(inputs: RunInputs) -> Gate:
    gate, sizes = inputs.fusion.gate, inputs.info.hidden_sizes
    if gate is None or gate == FRESH_GATE:
        return Gate(sizes, DEFAULT_WIDTH, inputs.gate_kind)
    return check_gate(gate, inputs.fusion.specialist_names, sizes).empty_gate()


def _draft_head(inputs: RunInputs) -> DraftHead:
    """Without memory, with as large a vocabulary as the responses can need."""
    num_draft_ids = min(inputs.settings.draft_vocabulary, inputs.info.num_shared_ids)
    with torch.device("meta"):
        return DraftHead(draft_head_config(inputs, num_draft_ids))


def _num_learning(learner: nn.Module) -> int:
    return sum(parameter.numel() for parameter in learner.parameters())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
