"""One specialist goes on alone, ahead of the others, with its own weights and its own KV blocks.

It writes keys and values where verification will put the same ones again, so that nothing has to be taken back: what a
wrong draft leaves is written over before it is read. Knows one runner and its batch; neither gate nor verification,
nor how a token is chosen.

Shapes: B requests that run ahead, X blocks a request may have, D hidden size, V vocabulary, K drafts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.server.engine.worker.guessing import Guesses


def run_ahead(
    runner: GPUModelRunner, requests: Sequence[str], num_tokens: int, num_shared_ids: int, guesses: Guesses
) -> list[list[int]]:
    """So many tokens for each request, chosen by `guesses` out of the ids that all specialists share.

    The runner knows each request up to its last token; there are blocks for the drafts, and the context has room.
    """
    batch = runner.input_batch
    rows = np.array([batch.req_id_to_index[request] for request in requests])
    lengths = batch.num_tokens_no_spec[rows].astype(np.int64)
    ids_B = torch.from_numpy(batch.token_ids_cpu[rows, lengths - 1].astype(np.int64)).to(runner.device)
    positions_B = torch.from_numpy(lengths - 1).to(runner.device)
    table = batch.block_table[0]
    blocks_BX = table.get_device_tensor(batch.num_reqs)[torch.from_numpy(rows).to(runner.device)]
    drafts: list[Tensor] = []
    with torch.inference_mode(), set_current_vllm_config(runner.vllm_config):
        for index in range(num_tokens):
            hidden_BD = _forward(runner, ids_B, positions_B, blocks_BX, table.block_size)
            ids_B = guesses.choose(runner.model.compute_logits(hidden_BD)[:, :num_shared_ids], index)
            drafts.append(ids_B)
            positions_B = positions_B + 1
    tokens_BK: list[list[int]] = torch.stack(drafts, dim=1).tolist()
    return tokens_BK


def _forward(runner: GPUModelRunner, ids_B: Tensor, positions_B: Tensor, blocks_BX: Tensor, block_size: int) -> Tensor:
    """The last hidden states [B, D] of one pass over one token of each request."""
    blocks_B = blocks_BX.gather(1, (positions_B // block_size)[:, None])[:, 0].long()
    slots_B = blocks_B * block_size + positions_B % block_size
    starts = torch.arange(len(ids_B) + 1, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(runner.device),
        query_start_loc_cpu=starts,
        seq_lens=(positions_B + 1).to(torch.int32),
        num_reqs=len(ids_B),
        num_actual_tokens=len(ids_B),
        max_query_len=1,
        max_seq_len=int(positions_B.max()) + 1,
        block_table_tensor=blocks_BX,
        slot_mapping=slots_B,
        positions=positions_B,
    )
    attention: dict[str, Any] = {}
    slots: dict[str, Tensor] = {}
    for group in runner.attn_groups[0]:
        metadata = group.build_metadata(common)
        attention |= dict.fromkeys(group.layer_names, metadata)
        slots |= dict.fromkeys(group.layer_names, slots_B)
    with set_forward_context(attention, runner.vllm_config, num_tokens=len(ids_B), slot_mapping=slots):
        hidden_BD: Tensor = runner.model(input_ids=ids_B.to(torch.int32), positions=positions_B)
    return hidden_BD
