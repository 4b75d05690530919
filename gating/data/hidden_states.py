"""Hidden states of frozen specialists, computed once and kept on disk: what stage 1 needs of a specialist, no more.

A folder of the cache holds, for one specialist and one set of rows, the hidden states that predict the response tokens
and the output layer. Specialists are loaded one after the other, so a machine that holds one of them can train a gate
for all. Knows specialists and rows; does not know gates or trainers.

Shape suffixes: R response tokens of a row, N of all rows, D hidden size, V shared vocabulary.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from ultrafuser.gating.commands.fields import Precision
from ultrafuser.gating.data.batches import collate_rows, response_ids
from ultrafuser.gating.model.cache import Artifact, Report, Tick, build_once
from ultrafuser.gating.model.loading import identify, load_one_frozen
from ultrafuser.gating.model.responses import response_states, response_turns
from ultrafuser.gating.model.schema import FusionConfig

if TYPE_CHECKING:
    import datasets

# Part of the cache key: raise it when the same rows and specialist are to give other states.
_RECIPE = 1


@dataclass(frozen=True)
class HiddenStateSource:
    """One frozen specialist, not loaded yet."""

    name: str
    """For the progress display."""

    identity: object
    """What its weights depend on, as JSON values."""

    load: Callable[[], Any]
    """Loads the model, in eval mode, in the type in which its states are to be kept."""

    dtype: torch.dtype
    hidden_size: int

    sequence: int
    """Which of a row's sequences it reads: the specialist's place in the fusion that the rows were encoded for."""


def hidden_state_sources(
    fusion: FusionConfig, hidden_sizes: Sequence[int], dtype: torch.dtype
) -> list[HiddenStateSource]:
    """The specialists of a prepared fusion; `hidden_sizes` are theirs, `dtype` that of the states."""
    return [
        HiddenStateSource(item.name, identify(item), partial(load_one_frozen, fusion, index, dtype), dtype, size, index)
        for index, (item, size) in enumerate(zip(fusion.specialists, hidden_sizes, strict=True))
    ]


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of the specialists' arithmetic on this device."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


class CachedHiddenStates(Dataset[tuple[list[Tensor], Tensor, Tensor]]):
    """Rows as S tensors [R, D_s], their labels [R] and the responses that these are of [R], read when asked for."""

    def __init__(self, states: Sequence[Tensor], offsets: Sequence[int], labels_N: Tensor, responses_N: Tensor) -> None:
        """`states`: S tensors [N, D_s]; row i has tokens `offsets[i]` to `offsets[i + 1]`, the last one is N;
        `responses_N`: of which response each token is, every turn of every row being one of its own."""
        self._states = list(states)
        self.offsets = list(offsets)
        self._labels_N = labels_N
        self.responses_N = responses_N

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tokens(self, begin: int, end: int) -> tuple[list[Tensor], Tensor]:
        """Tokens of all rows, counted through: S tensors [end - begin, D_s] and their labels."""
        return [states_ND[begin:end] for states_ND in self._states], self._labels_N[begin:end]

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor, Tensor]:
        begin, end = self.offsets[index], self.offsets[index + 1]
        return *self.tokens(begin, end), self.responses_N[begin:end]


def cache_hidden_states(
    rows: "datasets.Dataset",
    sources: Sequence[HiddenStateSource],
    *,
    num_shared_ids: int,
    batch_size: int,
    device: torch.device,
    cache_dir: Path,
    on_progress: Report | None = None,
) -> tuple[CachedHiddenStates, list[Tensor]]:
    """The rows' hidden states and the specialists' output layers (S tensors [V, D_s]), from the cache or computed now.

    Disk: sum over specialists of N x D_s values of the specialist's type. `batch_size` rows are computed at a time.
    """
    offsets = list(accumulate(rows["num_response_tokens"][:], initial=0))
    states, output_weights = [], []
    for source in sources:
        parts = {
            "recipe": _RECIPE,
            "specialist": source.identity,
            "rows": _digest(rows, source.sequence),
            "dtype": str(source.dtype),
            "num_shared_ids": num_shared_ids,
        }
        build = partial(_compute, rows, source, offsets, num_shared_ids, batch_size, device)
        artifact = Artifact("states", f"hidden states of {source.name}", parts, build)
        folder = build_once(artifact, cache_dir, on_progress or (lambda label, share: None))
        states.append(_map(folder / "states.bin", (offsets[-1], source.hidden_size), source.dtype))
        output_weights.append(load_file(folder / "output_layer.safetensors")["weight"])
    return CachedHiddenStates(states, offsets, *_labels_and_responses(rows)), output_weights


def _labels_and_responses(rows: "datasets.Dataset") -> tuple[Tensor, Tensor]:
    """Of all rows [N]: the response tokens, and of which response each is. Not in the cache, as the rows say it."""
    labels, responses, num_responses = [], [], 0
    for row in rows:  # one by one: a list of all tokens would be many times as large as what is kept
        labels.append(torch.tensor(response_ids(row)))
        responses.append(num_responses + response_turns(torch.tensor([row["response_mask"][0]])))
        num_responses = int(responses[-1][-1]) + 1
    return torch.cat(labels), torch.cat(responses)


@torch.no_grad()
def _compute(
    rows: "datasets.Dataset",
    source: HiddenStateSource,
    offsets: Sequence[int],
    num_shared_ids: int,
    batch_size: int,
    device: torch.device,
    folder: Path,
    tick: Tick,
) -> None:
    """Rows of similar length go together; each batch writes its rows' places in the file."""
    specialist = source.load().to(device)
    output_layer = specialist.get_output_embeddings()
    assert output_layer.bias is None, "an output layer with a bias cannot be kept as one matrix"
    weight_VD = output_layer.weight[:num_shared_ids].contiguous().cpu()
    save_file({"weight": weight_VD}, folder / "output_layer.safetensors")
    states_ND = _map(folder / "states.bin", (offsets[-1], source.hidden_size), source.dtype)
    lengths, counts = rows["length"][:], rows["num_response_tokens"][:]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for begin in range(0, len(order), batch_size):
        tick(begin / len(order))
        chosen = order[begin : begin + batch_size]
        batch = collate_rows([_only(rows[row], source.sequence) for row in chosen])
        tensors = [batch[key][0].to(device) for key in ("input_ids", "attention_mask", "response_mask")]
        found = response_states(specialist, *tensors).to(source.dtype).cpu()
        for row, states_RD in zip(chosen, found.split([counts[row] for row in chosen]), strict=True):
            states_ND[offsets[row] : offsets[row + 1]] = states_RD


def _only(row: dict[str, Any], sequence: int) -> dict[str, Any]:
    return {"input_ids": [row["input_ids"][sequence]], "response_mask": [row["response_mask"][sequence]]}


def _map(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The file as a tensor; it grows to its size when it is mapped for the first time."""
    return torch.from_file(str(path), shared=True, size=shape[0] * shape[1], dtype=dtype).view(shape)


def _digest(rows: "datasets.Dataset", sequence: int) -> str:
    """What one specialist reads of the rows: its own sequences and masks."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["input_ids"][sequence], row["response_mask"][sequence]]).encode())
    return digest.hexdigest()
