"""Rows to tensors: what a learner's forward pass takes. Knows the columns of encoded rows and of cached states.

Shape suffixes: S specialists, B rows, T positions (left-padded), N response tokens of a batch, D hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ultrafuser.gating.model.decoding import left_pad


def collate_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Encoded conversations (`gating/data/encoded_rows.py`) as a batch for `FusedLearner`.

    Returns:
        `input_ids`, `attention_mask`, `response_mask`: lists of S tensors [B, T_s]; `labels` [N]: the response tokens
        row after row, the same whichever specialist's sequence they are read from.
    """
    cpu = torch.device("cpu")
    num_specialists = len(rows[0]["input_ids"])
    padded = [left_pad([row["input_ids"][index] for row in rows], cpu) for index in range(num_specialists)]
    masks = [left_pad([row["response_mask"][index] for row in rows], cpu)[0].bool() for index in range(num_specialists)]
    return {
        "input_ids": [ids_BT for ids_BT, _ in padded],
        "attention_mask": [mask_BT for _, mask_BT in padded],
        "response_mask": masks,
        "labels": padded[0][0][masks[0]],
    }


def response_ids(row: Mapping[str, Any]) -> list[int]:
    """The response tokens of one encoded conversation."""
    pairs = zip(row["input_ids"][0], row["response_mask"][0], strict=True)
    return [token for token, is_response in pairs if is_response]


def collate_hidden_states(rows: Sequence[tuple[list[Tensor], Tensor, Tensor]]) -> dict[str, Any]:
    """Cached rows (`gating/data/hidden_states.py`) as a batch for `CachedLearner`: `hidden_states` S x [N, D_s],
    `labels` [N] and `responses` [N], which of the batch's responses each label is of."""
    num_specialists = len(rows[0][0])
    # A row may follow itself, where a domain begins anew: its numbers are then those of two responses.
    responses = [len(rows) * responses_R + place for place, (*_, responses_R) in enumerate(rows)]
    return {
        "hidden_states": [torch.cat([states[index] for states, *_ in rows]) for index in range(num_specialists)],
        "labels": torch.cat([labels for _, labels, _ in rows]),
        "responses": torch.cat(responses),
    }
