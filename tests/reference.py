"""What the Transformers reference says of tokens that are given, and to a conversation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from ultrafuser.gating.model.decoding import Generation, left_pad
from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.templates import fold_messages


def read(model: UltraFuserForCausalLM, prompts: list[list[int]], given: list[int]) -> tuple[Tensor, Tensor]:
    """Log probabilities [T, V] at each token of a given response, and weights [T, S]; from one forward pass.

    `prompts` has one prompt per specialist.
    """
    cpu = torch.device("cpu")
    batch: dict[str, Any] = {"input_ids": [], "attention_mask": [], "response_mask": []}
    for prompt in prompts:
        ids_BT, mask_BT = left_pad([prompt + given], cpu)
        batch["input_ids"].append(ids_BT)
        batch["attention_mask"].append(mask_BT)
        batch["response_mask"].append((torch.arange(ids_BT.shape[1]) >= len(prompt))[None])
    with torch.no_grad():
        output = model(**batch)
    return output.logits[0].log_softmax(dim=-1), output.gate_weights[:, 0].T


def read_text(model: UltraFuserForCausalLM, token_ids: list[int]) -> Tensor:
    """Log probabilities [T - 1, V] at each token of a text but the first, which all specialists read as it is."""
    return read(model, [token_ids[:1]] * len(model.specialists), token_ids[1:])[0]


def answer(
    fusion: FusionConfig, messages: Sequence[Mapping[str, Any]], max_new_tokens: int
) -> tuple[Generation, list[list[int]]]:
    """The greedy answer, and the prompts it answers: one for every specialist, in the specialist's own template."""
    prompts = []
    for specialist in fusion.specialists:
        tokenizer = AutoTokenizer.from_pretrained(specialist.model)
        assert specialist.chat_template is not None
        folded, _ = fold_messages(messages, None, specialist.chat_template)
        text = tokenizer.apply_chat_template(
            folded, chat_template=specialist.chat_template, tokenize=False, add_generation_prompt=True
        )
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    (generation,) = UltraFuserForCausalLM.from_fusion(fusion).respond([prompts], max_new_tokens=max_new_tokens)
    return generation, prompts
