"""What a follower with ranks of its own sends for a row, and how the leader makes logits of it.

With `exchange: logits` these are the logits. With `exchange: hidden` it is the last hidden state, and the leader's
ranks hold the follower's output head beside their own: every model has as many ranks, so each takes the shard that the
follower's rank which it meets has loaded. Knows models and weights, neither rows nor the gate.

Shapes: B rows, D hidden size, V rows of a shard, or of the vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.server.engine.worker.exchange import Exchange


@dataclass(frozen=True)
class Sent:
    """What one follower sends for each row."""

    width: int
    dtype: torch.dtype
    logits_of: Callable[[Tensor], Tensor]
    """From B of them to their logits [B, V]."""
    num_bytes: int
    """Of memory that this takes at the leader's."""
    hidden_size: int
    hidden_dtype: torch.dtype
    """Of the hidden state, which stands in a row's place or comes beside its logits."""


@dataclass(frozen=True)
class _Introduction:
    """What a follower says of itself when its weights are loaded."""

    width: int
    dtype: torch.dtype
    head_shape: tuple[int, ...]
    """Of the weights that follow; empty: none."""
    head_dtype: torch.dtype
    logits_processor: nn.Module | None
    hidden_size: int
    hidden_dtype: torch.dtype


class _Head(nn.Module):
    """A shard of another model's output head, as much as vLLM's `LogitsProcessor` wants of one."""

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_VD, requires_grad=False)
        self.tp_size = get_tp_group().world_size
        self.quant_method = UnquantizedEmbeddingMethod()
        self.quant_method.process_weights_after_loading(self)


def introduce(
    runner: GPUModelRunner, name: str, what: Literal["logits", "hidden"], num_shared_ids: int, exchange: Exchange
) -> None:
    """A follower's part: say what will be sent, and send the output head if it is hidden states.

    Raises:
        ValueError: the leader could not make the same logits of them.
    """
    model, config = runner.model, runner.model_config
    width = config.get_hidden_size()
    if what == "logits":
        dtype = _logits_dtype(model, width, config.dtype, runner.device)
        exchange.share(_Introduction(num_shared_ids, dtype, (), dtype, None, width, config.dtype))
        return
    if not _is_plain(model, width, config.dtype, runner.device):
        raise ValueError(
            f"specialists.{name}.model: its output head is quantised, or no plain matrix; set engine.exchange: logits"
        )
    weight_VD = model.lm_head.weight.data
    own = (width, config.dtype, tuple(weight_VD.shape), weight_VD.dtype, model.logits_processor)
    exchange.share(_Introduction(*own, width, config.dtype))
    exchange.send(weight_VD)
    model.compute_logits = _no_logits


def _no_logits(hidden_BD: Tensor) -> Tensor:
    """In the place of logits that nobody reads."""
    return hidden_BD


@contextmanager
def computing_logits(runner: GPUModelRunner) -> Iterator[None]:
    """Have a follower's model give logits where it guesses by itself, whatever it is to send of a step's rows."""
    instead = vars(runner.model).pop("compute_logits", None)
    yield
    if instead is not None:
        runner.model.compute_logits = instead


def meet(exchange: Exchange) -> list[Sent]:
    """The leader's part: what each follower sends, the output heads taken in."""
    followers: list[_Introduction] = exchange.share()[1:]
    with_head = [own for own in followers if own.logits_processor is not None]
    if not with_head:
        return [_sent(own, lambda logits_BV: logits_BV, 0) for own in followers]
    weights = exchange.receive([(own.head_shape, own.head_dtype) for own in followers])
    return [_through_head(own, weight_VD) for own, weight_VD in zip(followers, weights, strict=True)]


def _through_head(follower: _Introduction, weight_VD: Tensor) -> Sent:
    head, processor = _Head(weight_VD), follower.logits_processor
    assert processor is not None
    return _sent(follower, lambda hidden_BD: processor(head, hidden_BD), weight_VD.nbytes)


def _sent(own: _Introduction, logits_of: Callable[[Tensor], Tensor], num_bytes: int) -> Sent:
    return Sent(own.width, own.dtype, logits_of, num_bytes, own.hidden_size, own.hidden_dtype)


@torch.inference_mode()
def _logits_dtype(model: Any, width: int, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of what a model really gives: some soften or scale their logits in another type than that of the head."""
    logits: Tensor = model.compute_logits(torch.zeros(1, width, dtype=dtype, device=device))
    return logits.dtype


@torch.inference_mode()
def _is_plain(model: Any, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether logits are what vLLM's processor makes of hidden states and a plain matrix, and nothing else."""
    head, processor = getattr(model, "lm_head", None), getattr(model, "logits_processor", None)
    if processor is None or not isinstance(getattr(head, "quant_method", None), UnquantizedEmbeddingMethod):
        return False
    hidden_BD = torch.linspace(-1, 1, 2 * width, device=device).reshape(2, width).to(dtype)
    return torch.equal(model.compute_logits(hidden_BD), processor(head, hidden_BD))
