"""What n runners need beyond a loop before they serve: memory to mix in, a workspace that stays where it is.

vLLM profiles, warms up and captures one model; here it does so n times over, and what the models share must survive the
next one's turn. Knows runners, no requests.

Shapes: R rows of the largest step, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.mixing import Rows


def largest_step(runners: Sequence[GPUModelRunner]) -> list[Rows]:
    """Hidden states [R, D] and logits [R, V] of every specialist, as many as a step can leave, held at once."""
    rows = []
    for runner in runners:
        schedule, model = runner.scheduler_config, runner.model_config
        num_rows = min(schedule.max_num_seqs * (1 + runner.num_spec_tokens), schedule.max_num_batched_tokens)
        hidden_RD, logits_RV = (
            torch.rand(num_rows, width, dtype=model.dtype, device=runner.device)
            for width in (model.get_hidden_size(), model.get_vocab_size())
        )
        places = [divmod(number, 1 + runner.num_spec_tokens) for number in range(num_rows)]
        each_R = [Row(str(slot), position, is_draft=position > 0, slot=slot) for slot, position in places]
        rows.append(Rows(each_R, hidden_RD, logits_RV))
    return rows


@contextmanager
def keeping_workspace(name: str) -> Iterator[None]:
    """Watch over the scratch memory that vLLM's models share, while the named specialist's CUDA graphs are captured.

    Raises:
        ValueError: it had to grow, which moves it; the graphs of the specialists before would write where it was.
    """
    before = _workspace_addresses()
    yield
    moved = [old for old, new in zip(before, _workspace_addresses(), strict=True) if old is not None and old != new]
    if moved:
        raise ValueError(
            f"specialists.{name}.model: its kernels need more scratch memory than those of the specialists before it; "
            "name it first, or set engine.enforce_eager"
        )


def _workspace_addresses() -> list[int | None]:
    if not is_workspace_manager_initialized():
        return []
    workspaces = current_workspace_manager()._current_workspaces
    return [None if workspace is None else workspace.data_ptr() for workspace in workspaces]
