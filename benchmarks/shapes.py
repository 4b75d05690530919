"""Fused models of a real size without their weights: published configurations, a vocabulary of numbered words.

For measurements of speed and memory alone: the engine fills in random weights (`engine.load_format: dummy`), and token
ids are the prompts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config

NAMES = ("text", "code", "math")


@dataclass(frozen=True)
class Shape:
    """One model's configuration."""

    config: PreTrainedConfig

    num_tokens: int
    """Entries of its tokenizer; the output layer may be wider."""


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            dtype="bfloat16",
        ),
        num_tokens=300,
    ),
    "SmolLM2-135M": Shape(
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            dtype="bfloat16",
        ),
        num_tokens=49152,
    ),
    "Qwen2.5-7B": Shape(
        Qwen2Config(
            architectures=["Qwen2ForCausalLM"],
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
            dtype="bfloat16",
        ),
        num_tokens=151665,
    ),
}
"""`tiny` is for trying out; the others are what their makers published under these names."""


@contextmanager
def fusion_of_shape(shape: str, engine: Mapping[str, Any]) -> Iterator[str]:
    """The file of a fusion of three models of one of `SHAPES`, which is there while it is used."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fusion.yaml"
        _write_model(Path(folder) / "model", SHAPES[shape])
        content = {
            "name": f"3 x {shape}",
            "specialists": [{"name": name, "model": "./model", "chat_template": "chatml"} for name in NAMES],
            "gate": "package:fresh",
            "eos_token_ids": [0],
            "engine": {"load_format": "dummy", **engine},
        }
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        yield str(path)


def _write_model(folder: Path, shape: Shape) -> None:
    shape.config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(shape.num_tokens)}, unk_token="<1>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<0>").save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
