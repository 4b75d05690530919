"""A tiny fused model on disk, with stated properties; every test of the engine and of the reference uses it.

- Specialists are random Llama models of different depth, width (if asked) and vocabulary, with an untied output layer.
- Their tokenizers agree on ids 0..min(vocab_sizes)-1: 4 special tokens, 256 bytes, pairs of letters. Each has ids of
  its own beyond, as likely as any other id: a server that does not mask them is found out.
- Output rows of bytes that are no printable ASCII are zero, so greedy text is readable and stop strings can cut it.
- The final norm leaves a marker in the hidden state: dimension s is positive for specialist s and zero for the others.
  A closed gate reads it, so its weights are exactly 1.0 and 0.0 in float32, over the same specialists.
- Weights are large enough for greedy outputs that vary with the prompt, and for a clear winner at nearly every step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.gate_file import save_gate
from ultrafuser.gating.model.gate_kind import GateKind

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<s>", "<|im_end|>", "<|im_start|>")
MAX_POSITIONS = 1024
TEMPLATES = ("chatml", "ultralm", "alpaca")
LOGIT_STD = 6.0


def write_tiny_fusion(
    folder: Path,
    *,
    num_layers: Sequence[int] = (2, 3, 1),
    hidden_sizes: Sequence[int] = (64, 64, 64),
    vocab_sizes: Sequence[int] = (320, 336, 328),
    seed: int = 0,
    names: Sequence[str] = ("text", "code", "math"),
    gate: str = "random",
    templates: Sequence[str] = TEMPLATES,
    dtype: str = "float32",
    engine: Mapping[str, Any] | None = None,
    markers: Sequence[str] = (),
) -> Path:
    """Write specialists, tokenizers, gate and fusion file below `folder`; returns the path of fusion.yaml.

    `gate` is "random", "closed:NAME" (that specialist's weight is exactly one), "none" (for one specialist), or a kind
    of gate, which is then random.
    Two calls that differ only in `gate` write the same specialists. `engine` adds to the file's engine settings;
    `markers` are tokens that all tokenizers share, in the place of the last pairs of letters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_shared = min(vocab_sizes)
    for index, name in enumerate(names):
        tokenizer = build_tokenizer(num_shared, vocab_sizes[index], name, markers)
        tokenizer.save_pretrained(str(folder / name))
        model = build_specialist(
            index, len(names), num_layers[index], hidden_sizes[index], vocab_sizes[index], seed=1000 * seed + index
        )
        model.to(getattr(torch, dtype)).save_pretrained(str(folder / name))
    content = {
        "name": "tiny",
        "specialists": [
            {"name": name, "model": f"./{name}", "chat_template": template, "dtype": dtype}
            for name, template in zip(names, templates, strict=False)
        ],
        "eos_token_ids": [EOS_ID],
        "engine": {"block_size": 32, "enforce_eager": True, "kv_cache_memory_bytes": 2**26, **(engine or {})},
    }
    if gate != "none":
        save_gate(build_gate(gate, names, hidden_sizes, seed), folder / "gate.safetensors", names)
        content["gate"] = "gate.safetensors"
    path = folder / "fusion.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def build_tokenizer(
    num_shared: int, vocab_size: int, name: str, markers: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; ids from `num_shared` on are this specialist's own."""
    tokens = [*SPECIAL_TOKENS, *_byte_tokens()]
    letters = "etaoinshrdlu"
    pairs = [(first, second) for first in letters for second in letters][: num_shared - len(tokens) - len(markers)]
    tokens += [first + second for first, second in pairs]
    tokens += markers
    assert len(tokens) == num_shared, "num_shared must lie between 260 and 404"
    tokens += [f"<{name}-{index}>" for index in range(vocab_size - num_shared)]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in markers])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def build_specialist(
    index: int, num_specialists: int, num_layers: int, hidden_size: int, vocab_size: int, *, seed: int
) -> LlamaForCausalLM:
    """A random Llama whose residual stream carries constants in its first `num_specialists` dimensions."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                std = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
                parameter.normal_(0, 1.5 * std if "self_attn" in name else std, generator=generator)
        markers = slice(0, num_specialists)
        model.model.embed_tokens.weight[:, markers] = 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[markers] = 0
            layer.mlp.down_proj.weight[markers] = 0
        model.model.norm.weight[markers] = 0
        model.model.norm.weight[index] = 1
        model.lm_head.weight *= LOGIT_STD
        model.lm_head.weight[:, markers] = 0
        model.lm_head.weight[_unprintable_ids()] = 0
    return model


def build_gate(wanted: str, names: Sequence[str], hidden_sizes: Sequence[int], seed: int = 0) -> Gate:
    """A gate whose weights vary strongly from token to token, or one closed on a specialist."""
    is_closed = wanted.startswith("closed:")
    gate = Gate(hidden_sizes, width=512, kind=GateKind() if is_closed or wanted == "random" else GateKind.parse(wanted))
    generator = torch.Generator().manual_seed(3 + seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            size = parameter.shape[-1] if parameter.dim() else 1
            parameter.normal_(0, size**-0.5, generator=generator)
        gate.score.weight *= 3
        if not gate.projections:  # the markers would favour one specialist at every token
            step = hidden_sizes[0] if gate.kind.joint else gate.hidden.in_features
            for layer in (gate.hidden, *([gate.memory] if gate.kind.smoothed else [])):
                for begin in range(0, layer.in_features, step):
                    layer.weight[:, begin : begin + len(names)] = 0
        if is_closed:
            _close(gate, list(names).index(wanted.removeprefix("closed:")))
    return gate


def _close(gate: Gate, index: int) -> None:
    for parameter in gate.parameters():
        parameter.zero_()
    for projection in gate.projections:
        assert isinstance(projection, torch.nn.Linear)
        torch.nn.init.eye_(projection.weight)
    # A marker is at least 0.05 at every depth used here: 10^5 times it is beyond what exp() distinguishes from 0.
    gate.hidden.weight[0, index] = 1000
    gate.score.weight[0, 0] = 100


def _byte_tokens() -> list[str]:
    """The 256 characters by which byte-level tokenizers write the bytes 0..255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _unprintable_ids() -> list[int]:
    offset = len(SPECIAL_TOKENS)
    unprintable = [byte + offset for byte in range(256) if not (32 <= byte < 127 or byte == ord("\n"))]
    return [PAD_ID, BOS_ID, SPECIAL_TOKENS.index("<|im_start|>"), *unprintable]
