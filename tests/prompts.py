"""A question as every specialist of a real fusion reads it, rendered without the server's own code."""

from transformers import AutoTokenizer

from ultrafuser.gating.model.schema import FusionConfig
from ultrafuser.gating.templates import fold_messages


def prompts_of(fusion: FusionConfig, question: str) -> list[list[int]]:
    """Token ids of the question in each specialist's template; the fusion is prepared."""
    prompts = []
    for specialist in fusion.specialists:
        tokenizer = AutoTokenizer.from_pretrained(specialist.model)
        assert specialist.chat_template is not None
        messages, _ = fold_messages([{"role": "user", "content": question}], None, specialist.chat_template)
        text = tokenizer.apply_chat_template(
            messages, chat_template=specialist.chat_template, tokenize=False, add_generation_prompt=True
        )
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    return prompts
