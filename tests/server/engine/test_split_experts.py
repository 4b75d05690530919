"""Mixtures of experts on ranks of their own, whose groups vLLM makes by the leader's configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.fakes import BOS_ID, EOS_ID, LOGIT_STD, MAX_POSITIONS, PAD_ID, write_tiny_fusion
from tests.server.engine.harness import Arrival, InProcessEngine, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

MAX_TOKENS = 12
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate([(13, 36), (40, 5), (1, 20)])]
VOCAB_SIZES = {"dense": 320, "experts": 328}


@pytest.fixture(scope="module", params=[("dense", "experts"), ("experts", "dense")], ids="-".join)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Judge]:
    """Two specialists, one of them a mixture of experts, and their reference."""
    names = request.param
    folder = tmp_path_factory.mktemp("mixed")
    path = write_tiny_fusion(
        folder,
        num_layers=(1, 1),
        hidden_sizes=(64, 64),
        vocab_sizes=[VOCAB_SIZES[name] for name in names],
        names=names,
    )
    write_experts(folder / "experts", VOCAB_SIZES["experts"])
    return path, Judge(UltraFuserForCausalLM.from_fusion(load_fusion(path)))


def write_experts(folder: Path, vocab_size: int) -> None:
    """A random mixture of four experts in the place of a specialist, whose tokenizer stays."""
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = Qwen3MoeForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.0 if "embed" in name else parameter.shape[-1] ** -0.5, generator=generator)
        model.lm_head.weight *= LOGIT_STD
    model.save_pretrained(str(folder))


@pytest.mark.parametrize(
    "options",
    [
        {"placement": "split"},
        pytest.param({"placement": "split", "tensor_parallel_size": 2}, marks=pytest.mark.long),
        pytest.param({"placement": "split", "tensor_parallel_size": 2, "exchange": "hidden"}, marks=pytest.mark.long),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_experts_lead_and_follow(mixed: tuple[Path, Judge], options: dict[str, Any]) -> None:
    path, judge = mixed
    arrivals = [Arrival(prompts, greedy(MAX_TOKENS), step=2 * i) for i, prompts in enumerate(BATCH)]
    with InProcessEngine(path, **options, max_num_batched_tokens=16, max_num_seqs=8) as engine:
        assert engine.tokens(arrivals) == [judge.tokens(prompts, MAX_TOKENS) for prompts in BATCH]
