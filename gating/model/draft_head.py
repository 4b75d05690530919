"""The draft head: a small network that guesses the fused model's next tokens from its specialists' last hidden states.

After EAGLE-3 (arXiv 2503.01840), with the n specialists where EAGLE-3 takes three layers of one model: what the gate
weighs becomes one feature of a response position, the token that was drawn there joins it, one decoder layer attends
over the response so far (prompts are not aligned between specialists, so they are not seen), and an output layer scores
a reduced vocabulary. Further guesses take the head's own output in the place of a feature that is not known yet.
One definition for training and engine. It knows tensors and its own folder; neither tokenizers nor engines.

Position j of a response is what the specialists' states before token j and token j itself give; it guesses token j + 1.

Shape suffixes: S specialists, B rows (any leading shape), T positions of a response, C positions that are attended to,
D the head's size, H heads, K heads of keys and values, E size of a head, V draft vocabulary.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ultrafuser.gating.errors import CommandError, DraftHeadError
from ultrafuser.gating.files import read_json, replacing, write_json
from ultrafuser.gating.model.schema import Count

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_DRAFT_IDS = "draft_ids_V"
_WAY_OUT = "train a head for this fusion (ultrafuser train --drafter), or choose another drafter"


class DraftHeadConfig(BaseModel):
    """A head's shape, and what it was trained for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal["ultrafuser-draft-head-v1"] = "ultrafuser-draft-head-v1"

    specialists: Annotated[tuple[str, ...], Field(min_length=1)]
    """Their names, in the fusion's order."""

    hidden_sizes: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Width of each specialist's last hidden state; the head is as wide as the first, the leader's."""

    vocabulary: str
    """Digest of the tokens that the specialists share."""

    gate: str
    """Digest of the gate."""

    num_draft_ids: Count
    """Tokens that can be guessed."""

    num_heads: Count
    num_kv_heads: Count
    head_size: Count
    intermediate_size: Count

    window: Count = 256
    """Latest positions of a response that are attended to: what a request's cache holds."""

    rope_theta: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10_000.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.specialists) != len(self.hidden_sizes):
            raise ValueError(f"specialists: {len(self.specialists)} names for {len(self.hidden_sizes)} hidden_sizes")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads: {self.num_heads} is no multiple of num_kv_heads, {self.num_kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size: {self.head_size} is odd, and positions turn pairs of values")
        return self

    @property
    def size(self) -> int:
        """Width of features and of token embeddings: the leader's hidden size."""
        return self.hidden_sizes[0]


class DraftHead(nn.Module):
    """Scores what may follow. Embeddings of tokens are the leader's own: they are given, and are not in its file."""

    draft_ids_V: Tensor
    """Which tokens the columns of the scores are; the file holds them, so that no column changes its meaning."""

    def __init__(self, config: DraftHeadConfig) -> None:
        """Untrained weights, drawn by torch's own generator; the draft vocabulary is the first ids."""
        super().__init__()
        self.config = config
        size, kv_size = config.size, config.num_kv_heads * config.head_size
        self.fuse = nn.Linear(sum(config.hidden_sizes), size, bias=False)
        self.token_norm, self.feature_norm = nn.RMSNorm(size, eps=1e-6), nn.RMSNorm(size, eps=1e-6)
        self.query = nn.Linear(2 * size, config.num_heads * config.head_size, bias=False)
        self.key, self.value = nn.Linear(2 * size, kv_size, bias=False), nn.Linear(2 * size, kv_size, bias=False)
        self.mix = nn.Linear(config.num_heads * config.head_size, size, bias=False)
        self.mlp_norm = nn.RMSNorm(size, eps=1e-6)
        self.gate_up = nn.Linear(size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, size, bias=False)
        self.output_norm = nn.RMSNorm(size, eps=1e-6)
        self.output = nn.Linear(size, config.num_draft_ids, bias=False)
        self.register_buffer("draft_ids_V", torch.arange(config.num_draft_ids))

    def features(self, hidden_states: Sequence[Tensor], weights_SB: Tensor) -> Tensor:
        """Features [B, D] of positions whose states are known: S tensors [B, D_s], each weighed by the gate."""
        pairs = zip(hidden_states, weights_SB, strict=True)
        weighed = [(state * weight_B.unsqueeze(-1)).to(state.dtype) for state, weight_B in pairs]
        features_BD: Tensor = self.fuse(torch.cat(weighed, dim=-1).to(self.fuse.weight.dtype))
        return features_BD

    def inputs(self, embeddings_BD: Tensor, features_BD: Tensor) -> Tensor:
        """What the layer reads [B, 2 D]: the token's embedding beside the feature, each brought to one scale."""
        return torch.cat([_normed(self.token_norm, embeddings_BD), _normed(self.feature_norm, features_BD)], dim=-1)

    def keys_values(self, inputs_BX: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, E] of positions, for those after them to attend to."""
        shape = (*inputs_BX.shape[:-1], self.config.num_kv_heads, self.config.head_size)
        keys_BKE = rotate(self.key(inputs_BX).view(shape), positions_B, self.config.rope_theta)
        return keys_BKE, self.value(inputs_BX).view(shape)

    def queries(self, inputs_BX: Tensor, positions_B: Tensor) -> Tensor:
        """Queries [B, K, H / K, E], grouped by the keys that they look at."""
        config = self.config
        heads = (config.num_heads, config.head_size)
        queries_BHE = rotate(self.query(inputs_BX).view(*inputs_BX.shape[:-1], *heads), positions_B, config.rope_theta)
        return queries_BHE.unflatten(-2, (config.num_kv_heads, -1)) * config.head_size**-0.5

    def states(self, features_BD: Tensor, attended_BX: Tensor) -> Tensor:
        """The layer's output [B, D], which is also the feature of the next position as long as no better is known."""
        states_BD = features_BD + self.mix(attended_BX)
        gate, up = self.gate_up(_normed(self.mlp_norm, states_BD)).chunk(2, dim=-1)
        result_BD: Tensor = states_BD + self.down(nn.functional.silu(gate) * up)
        return result_BD

    def scores(self, states_BD: Tensor) -> Tensor:
        """Logits [B, V] of the draft vocabulary."""
        logits_BV: Tensor = self.output(_normed(self.output_norm, states_BD))
        return logits_BV


def _normed(norm: nn.RMSNorm, states_BD: Tensor) -> Tensor:
    """In the type of the weights, which under autocast is not that of the states."""
    normed_BD: Tensor = norm(states_BD.to(norm.weight.dtype))
    return normed_BD


def rotate(heads_BHE: Tensor, positions_B: Tensor, theta: float) -> Tensor:
    """Rotary embedding of heads [..., H, E] by the positions [...] of their tokens."""
    half = heads_BHE.shape[-1] // 2
    rates = theta ** (-torch.arange(half, device=heads_BHE.device, dtype=torch.float32) / half)
    angles = (positions_B.unsqueeze(-1).float() * rates).unsqueeze(-2)
    first, second = heads_BHE.float().split(half, dim=-1)
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat(turned, dim=-1).to(heads_BHE.dtype)


def attend(queries_BKGE: Tensor, keys_BCKE: Tensor, values_BCKE: Tensor, is_seen_BC: Tensor) -> Tensor:
    """One query position of each row over that row's keys and values; [B, H E]. Each sees at least one."""
    scores_BKGC = torch.einsum("bkge,bcke->bkgc", queries_BKGE, keys_BCKE).float()
    weights_BKGC = scores_BKGC.masked_fill(~is_seen_BC[:, None, None], float("-inf")).softmax(dim=-1)
    attended_BKGE = torch.einsum("bkgc,bcke->bkge", weights_BKGC.to(values_BCKE.dtype), values_BCKE)
    return attended_BKGE.flatten(-3)


def save_draft_head(head: DraftHead, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a head's folder, whole or not at all: `config.json` and weights in this type."""
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor.to(torch.int32)).detach().cpu().contiguous()
        for name, tensor in head.state_dict().items()
    }
    with replacing(Path(folder)) as partial:
        partial.mkdir()
        write_json(partial / CONFIG_FILE, head.config.model_dump(mode="json"))
        save_file(tensors, str(partial / WEIGHTS_FILE))


def check_draft_head(
    folder: str | Path,
    specialists: Sequence[str],
    hidden_sizes: Sequence[int],
    vocabulary: str,
    num_shared_ids: int,
    gate: str,
) -> DraftHeadConfig:
    """Check a head's configuration and its weights against the fusion; reads no weights but the head's.

    Args:
        folder: the head's.
        specialists: names, in the fusion's order.
        hidden_sizes: theirs.
        vocabulary: digest of the tokens they share (`vocabulary_digest`).
        num_shared_ids: how many these are.
        gate: the gate's digest (`gating/model/gate_file.py`).

    Raises:
        DraftHeadError: a file that is missing or unreadable, other specialists, sizes or tokens, another gate, other
            weights, weights that are not finite, a draft vocabulary that is none.
    """
    config = _read_config(Path(folder))
    wanted = {
        "specialists": tuple(specialists),
        "hidden_sizes": tuple(hidden_sizes),
        "vocabulary": vocabulary,
        "gate": gate,
    }
    for key, own in wanted.items():
        found = getattr(config, key)
        if found != own:
            raise DraftHeadError(f"{folder}: {key}: the head was trained for {found}, the fusion has {own}; {_WAY_OUT}")
    _check_weights(Path(folder), config)
    _check_values(Path(folder) / WEIGHTS_FILE, num_shared_ids)
    return config


def load_draft_head(folder: str | Path) -> DraftHead:
    """Read a head's folder, in the type in which its weights were written.

    Raises:
        DraftHeadError: a file that is missing or unreadable, or other weights than the configuration says.
    """
    config = _read_config(Path(folder))
    _check_weights(Path(folder), config)
    with torch.device("meta"):
        head = DraftHead(config)
    with safe_open(str(Path(folder) / WEIGHTS_FILE), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    tensors["draft_ids_V"] = tensors["draft_ids_V"].long()
    head.load_state_dict(tensors, assign=True)
    return head.requires_grad_(False).eval()


def vocabulary_digest(tokens: Sequence[str | None]) -> str:
    """What tells one shared vocabulary from another: SHA-256 of its tokens, by id."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()


def _read_config(folder: Path) -> DraftHeadConfig:
    if not (folder / CONFIG_FILE).is_file():
        raise DraftHeadError(f"{folder}: no draft head there, as it has no {CONFIG_FILE}; {_WAY_OUT}")
    try:
        return DraftHeadConfig.model_validate(read_json(folder / CONFIG_FILE, "copy the whole folder"))
    except CommandError as error:
        raise DraftHeadError(str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DraftHeadError(f"{folder / CONFIG_FILE}: {key or 'content'}: {first['msg']}; {_WAY_OUT}") from error


def _check_weights(folder: Path, config: DraftHeadConfig) -> None:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise DraftHeadError(f"{folder}: has no {WEIGHTS_FILE}; copy the whole folder")
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DraftHeadError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in DraftHead(config).state_dict().items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise DraftHeadError(
                f"{path}: {name}: shape is {shapes.get(name)}, need {wanted.get(name)}; copy the whole folder"
            )


def _check_values(path: Path, num_shared_ids: int) -> None:
    """Of a file with the right names and shapes, one tensor in memory at a time."""
    with safe_open(str(path), framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            is_vocabulary = name == _DRAFT_IDS
            if fault := _vocabulary_fault(tensor, num_shared_ids) if is_vocabulary else _weight_fault(tensor):
                raise DraftHeadError(f"{path}: {name}: {fault}; copy the whole folder, or {_WAY_OUT}")


def _vocabulary_fault(ids_V: Tensor, num_shared_ids: int) -> str | None:
    if ids_V.dtype not in (torch.int32, torch.int64):
        return f"token ids must be whole numbers of 32 or 64 bits, these are {ids_V.dtype}"
    if bool((ids_V.diff() <= 0).any()):
        return "token ids must ascend, each named once"
    if int(ids_V[0]) < 0 or int(ids_V[-1]) >= num_shared_ids:
        return f"token ids {int(ids_V[0])} to {int(ids_V[-1])} are not all of the {num_shared_ids} that are shared"
    return None


def _weight_fault(weight: Tensor) -> str | None:
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"weights must be float32, bfloat16 or float16, these are {weight.dtype}"
    return None if bool(weight.isfinite().all()) else "holds a value that is not finite"
