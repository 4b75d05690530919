"""Draft heads of a tiny fusion: one that was never trained, and one that has learnt some responses by heart."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ultrafuser.gating.model.draft_head import DraftHead, DraftHeadConfig, save_draft_head
from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion
from ultrafuser.gating.model.gate_file import gate_digest
from ultrafuser.gating.model.inspection import shared_vocabulary
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.model.responses import response_states
from ultrafuser.gating.training.draft_learner import DraftLearner, collate_responses, fresh_draft_head

Prompts = list[list[int]]
NO_TOKEN = -1


def config_for(fusion_path: Path, num_draft_ids: int = 300, window: int = 24) -> DraftHeadConfig:
    """Of a head for a tiny fusion: two heads of queries, a window that responses outgrow."""
    fusion = load_fusion(fusion_path)
    info = inspect_fusion(fusion)
    tokenizer = AutoTokenizer.from_pretrained(fusion.specialists[0].model)
    return DraftHeadConfig(
        specialists=fusion.specialist_names,
        hidden_sizes=info.hidden_sizes,
        vocabulary=shared_vocabulary(tokenizer, info.num_shared_ids),
        gate=gate_digest(fusion.gate),
        num_draft_ids=num_draft_ids,
        num_heads=2,
        num_kv_heads=1,
        head_size=32,
        intermediate_size=96,
        window=window,
    )


def write_random_head(fusion_path: Path, folder: Path) -> Path:
    """A head whose guesses are as good as any; returns its folder."""
    torch.manual_seed(0)
    head = DraftHead(config_for(fusion_path))
    with torch.no_grad():
        head.draft_ids_V.copy_(torch.arange(5, 305))
    save_draft_head(head, folder, dtype=torch.float32)
    return folder


def write_trained_head(
    fusion_path: Path, model: UltraFuserForCausalLM, answers: Sequence[tuple[Prompts, list[int]]], folder: Path
) -> Path:
    """A head that has seen these answers often enough to know most of them; returns its folder."""
    torch.manual_seed(0)
    config = config_for(fusion_path)
    specialists: list[Any] = list(model.specialists)
    weights = [own.get_output_embeddings().weight.detach() for own in specialists]
    draft_ids_V = torch.arange(config.num_draft_ids)
    head = fresh_draft_head(config, draft_ids_V, weights[0][: config.num_draft_ids])
    assert model.fusion_gate is not None
    learner = DraftLearner(
        head,
        model.fusion_gate,
        specialists[0].get_input_embeddings().weight.detach()[: model.config.num_shared_ids],
        [own[: config.num_draft_ids] for own in weights],
        num_guesses=4,
    )
    collate = partial(collate_responses, eos_token_id=NO_TOKEN, draft_ids_V=draft_ids_V)
    batch = collate([(states_of(model, prompts, tokens), torch.tensor(tokens)) for prompts, tokens in answers])
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        learner(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    save_draft_head(head, folder, dtype=torch.float32)
    return folder


@torch.no_grad()
def states_of(model: UltraFuserForCausalLM, prompts: Prompts, tokens: list[int]) -> list[Tensor]:
    """Each specialist's states [T, D] that predict the tokens of a response."""
    states = []
    for specialist, prompt in zip(model.specialists, prompts, strict=True):
        ids_BT = torch.tensor([prompt + tokens])
        is_response_BT = (torch.arange(ids_BT.shape[1]) >= len(prompt))[None]
        states.append(response_states(specialist, ids_BT, torch.ones_like(ids_BT), is_response_BT))
    return states
