"""What layers keep: sliding ones are planned as full ones, what cannot be is refused by the layer's name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, MambaSpec, SlidingWindowSpec

from ultrafuser.server.engine.worker.kv_plan import plan_in_full

SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = FullAttentionSpec(block_size=32, **SHAPE)
SLIDING = SlidingWindowSpec(block_size=64, sliding_window=12, **SHAPE)
CHUNKED = ChunkedLocalAttentionSpec(block_size=32, attention_chunk_size=64, **SHAPE)
STATE = MambaSpec(block_size=32, shapes=((2, 2),), dtypes=(torch.float32,))


def planned(layer_types: list[str] | None, *specs: Any) -> dict[str, Any]:
    """What a runner tells of its layers, once it is planned in full."""
    own = {f"model.layers.{index}.self_attn.attn": spec for index, spec in enumerate(specs)}
    runner: Any = SimpleNamespace(
        get_kv_cache_spec=lambda: own,
        initialize_metadata_builders=None,
        cache_config=SimpleNamespace(block_size=32),
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(layer_types=layer_types), get_sliding_window=lambda: 12
        ),
    )
    plan_in_full(runner, "code")
    return dict(runner.get_kv_cache_spec())


@pytest.mark.parametrize("layer_types", [None, ["sliding_attention", "full_attention"]])
def test_a_sliding_layer_is_planned_as_a_full_one_of_the_same_shape(layer_types: list[str] | None) -> None:
    assert list(planned(layer_types, SLIDING, FULL).values()) == [FULL, FULL]


@pytest.mark.parametrize(
    ("spec", "kind"), [(CHUNKED, "ChunkedLocalAttentionSpec"), (STATE, "MambaSpec")], ids=["chunked", "recurrent"]
)
def test_a_layer_that_keeps_something_else_is_refused_by_name(spec: Any, kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"specialists.code.model: layer model.layers.1.self_attn.attn keeps a {kind}"
    ):
        planned(None, FULL, spec)


def test_a_layer_that_vllm_lets_slide_against_its_configuration_is_refused() -> None:
    """GPT-OSS slides in every second layer for vLLM, whatever its configuration says."""
    with pytest.raises(ValueError, match=r"specialists.code.model: vLLM plans a SlidingWindowSpec for layer .*\.0\."):
        planned(["full_attention", "sliding_attention"], SLIDING, FULL)
