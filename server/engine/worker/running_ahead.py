"""One specialist goes on alone, ahead of the others, with its own weights and its own KV blocks.

It writes keys and values where verification will put the same ones again, so that nothing has to be taken back: what a
wrong draft leaves is written over before it is read. A pass reads where the runner's own steps read, so that their CUDA
graphs serve it, and nothing waits for the device but the end. Knows one runner and its batch; neither gate nor
verification, nor how a token is chosen.

Shapes: B requests that run ahead, N rows of a pass (more than B where a graph has more), X blocks a request may have,
D hidden size, V vocabulary, K drafts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, PAD_SLOT_ID
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.server.engine.worker.guessing import Guesses
from ultrafuser.server.engine.worker.transfer import to_device


def run_ahead(
    runner: GPUModelRunner, requests: Sequence[str], num_tokens: int, num_shared_ids: int, guesses: Guesses
) -> list[list[int]]:
    """So many tokens for each request, chosen by `guesses` out of the ids that all specialists share.

    The runner knows each request up to its last token; there are blocks for the drafts, and the context has room.
    """
    drafts: list[Tensor] = []
    with torch.inference_mode(), set_current_vllm_config(runner.vllm_config):
        passes = _Passes(runner, requests, num_tokens)
        for index in range(num_tokens):
            hidden_BD = passes.run(index)
            ids_B = guesses.choose(runner.model.compute_logits(hidden_BD)[:, :num_shared_ids], index)
            passes.follow(ids_B)
            drafts.append(ids_B)
        passes.end()
        tokens_BK: list[list[int]] = torch.stack(drafts, dim=1).tolist()
    return tokens_BK


class _Passes:
    """Passes over one token of each request, whose inputs are known beforehand but for the tokens.

    They lie in the runner's buffers, where its graphs find them; its next step fills these anew.
    """

    def __init__(self, runner: GPUModelRunner, requests: Sequence[str], num_passes: int) -> None:
        batch, self._runner = runner.input_batch, runner
        self._num_requests = len(requests)
        self._mode, self._graph = runner.single_tokens.find(len(requests))
        self._is_whole = self._mode == CUDAGraphMode.FULL
        rows_B = np.array([batch.req_id_to_index[request] for request in requests])
        self._lengths_B = batch.num_tokens_no_spec[rows_B].astype(np.int64)
        self._table = batch.block_table[0]
        positions_KB = self._lengths_B - 1 + np.arange(num_passes)[:, None]
        columns_KB, offsets_KB = np.divmod(positions_KB, self._table.block_size)
        blocks_KB = self._table.get_numpy_array()[rows_B, columns_KB].astype(np.int64)
        planned = np.stack([positions_KB, positions_KB + 1, blocks_KB * self._table.block_size + offsets_KB])
        self._positions_KB, self._seq_lens_KB, self._slots_KB = to_device(planned, runner.device)
        self._share_buffers(to_device(rows_B, runner.device))
        self.follow(to_device(batch.token_ids_cpu[rows_B, self._lengths_B - 1], runner.device))

    def _share_buffers(self, rows_B: Tensor) -> None:
        """Where passes read, with all in it that stays the same."""
        runner, num_requests, num_rows = self._runner, self._num_requests, self._graph.num_tokens
        # Attention stands outside of a graph of parts, and computes no rows that only fill it up.
        num_attended = (self._graph.num_reqs or num_rows) if self._is_whole else num_requests
        self._ids_N, self._positions_N = runner.input_ids.gpu[:num_rows], runner.positions[:num_rows]
        self._slots_N = self._table.slot_mapping.gpu[:num_rows]
        self._slots_N[num_requests:].fill_(PAD_SLOT_ID)
        self._seq_lens = runner.seq_lens[:num_attended]
        self._seq_lens[num_requests:].fill_(0)
        starts = np.minimum(np.arange(num_attended + 1, dtype=np.int32), num_requests)
        self._starts_on_host = torch.from_numpy(starts)
        self._starts = runner.query_start_loc.gpu[: num_attended + 1]
        self._starts.copy_(to_device(starts, runner.device))
        self._blocks = self._table.get_device_tensor(runner.input_batch.num_reqs)[rows_B]
        if self._is_whole:
            own, self._blocks = self._blocks, self._table.get_device_tensor(num_attended)
            self._blocks[:num_requests].copy_(own)
            self._blocks[num_requests:].fill_(NULL_BLOCK_ID)

    def follow(self, ids_B: Tensor) -> None:
        """Have the next pass read these tokens."""
        self._ids_N[: self._num_requests].copy_(ids_B)

    def run(self, index: int) -> Tensor:
        """The last hidden states [B, D] of pass `index`, which counts from 0."""
        runner, num_requests, num_rows = self._runner, self._num_requests, self._graph.num_tokens
        self._positions_N[:num_requests].copy_(self._positions_KB[index])
        self._seq_lens[:num_requests].copy_(self._seq_lens_KB[index])
        self._slots_N[:num_requests].copy_(self._slots_KB[index])
        common = CommonAttentionMetadata(
            query_start_loc=self._starts,
            query_start_loc_cpu=self._starts_on_host,
            seq_lens=self._seq_lens,
            num_reqs=len(self._seq_lens),
            num_actual_tokens=num_rows if self._is_whole else num_requests,
            max_query_len=1,
            max_seq_len=int(self._lengths_B.max()) + index,
            block_table_tensor=self._blocks,
            slot_mapping=self._slots_N,
            positions=self._positions_N,
        )
        attention: dict[str, Any] = {}
        slots: dict[str, Tensor] = {}
        for group in runner.attn_groups[0]:
            metadata = group.build_metadata(common)
            attention |= dict.fromkeys(group.layer_names, metadata)
            slots |= dict.fromkeys(group.layer_names, self._slots_N)
        with set_forward_context(
            attention,
            runner.vllm_config,
            num_tokens=num_rows,
            cudagraph_runtime_mode=self._mode,
            batch_descriptor=self._graph,
            slot_mapping=slots,
            is_padding=runner._prepare_padding_mask(num_requests, num_rows),
        ):
            hidden_ND: Tensor = runner.model(input_ids=self._ids_N, positions=self._positions_N)
        return hidden_ND[:num_requests]

    def end(self) -> None:
        """Put the runner's block table back where it was overwritten; the rest its next step writes anyway."""
        if self._is_whole:
            self._table.commit_block_table(self._runner.input_batch.num_reqs)
