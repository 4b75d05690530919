"""Of a model that sees, the text part becomes a plain model folder that computes the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests import families
from tests.gating.model.test_materialize import logits, with_first, write_adapter
from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.fusion import FusionConfig, inspect_fusion, load_fusion
from ultrafuser.gating.model.materialize import materialize


def fusion_of_one(folder: Path) -> FusionConfig:
    return load_fusion(families.write_fusion(folder, {"text": families.gemma3_with_vision()}))


def split(folder: Path, prefix: str) -> None:
    """The weights in two files, as hubs have them, named as of before Transformers 4.52, or since."""
    weights = load_file(folder / "model.safetensors")
    named = {name.replace("language_model.model.", prefix): weight for name, weight in weights.items()}
    (folder / "model.safetensors").unlink()
    places: dict[str, str] = {}
    for number, names in enumerate([sorted(named)[::2], sorted(named)[1::2]], start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: named[name] for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("prefix", [None, "language_model.model.", "model.language_model."])
def test_the_text_part_computes_what_the_whole_model_does(tmp_path: Path, prefix: str | None) -> None:
    fusion = fusion_of_one(tmp_path / "fusion")
    whole: Any = AutoModelForImageTextToText.from_pretrained(fusion.specialists[0].model).eval()
    if prefix is not None:
        split(Path(fusion.specialists[0].model), prefix)
    prepared = materialize(fusion, tmp_path / "cache", on_progress=lambda *_: None)
    part: Any = AutoModelForCausalLM.from_pretrained(prepared.specialists[0].model).eval()
    assert type(part).__name__ == "Gemma3ForCausalLM"
    assert torch.equal(logits(part), logits(whole))
    assert part.num_parameters() < whole.num_parameters()
    assert inspect_fusion(prepared).hidden_sizes == (64,)


def test_an_adapter_for_the_text_part_is_merged_and_one_for_the_whole_refused(tmp_path: Path) -> None:
    """Peft would have left the whole's out without a word."""
    fusion = fusion_of_one(tmp_path / "fusion")
    quiet: dict[str, Any] = {"on_progress": lambda *_: None}
    plain = materialize(fusion, tmp_path / "cache", **quiet).specialists[0].model
    adapter = write_adapter(plain, tmp_path / "adapter")
    merged = materialize(with_first(fusion, adapter=str(adapter)), tmp_path / "cache", **quiet)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (plain, merged.specialists[0].model)]
    assert not torch.allclose(logits(models[0]), logits(models[1]), atol=0.1)
    path = adapter / "adapter_model.safetensors"
    weights = {
        name.replace("model.model.layers", "model.model.language_model.layers"): own
        for name, own in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        FusionError, match=r"^specialists\.0\.adapter: does not fit .* \(it changes model\.language_model\."
    ):
        materialize(with_first(fusion, adapter=str(adapter)), tmp_path / "cache", **quiet)


def test_quantised_models_that_see_and_other_kinds_are_refused_by_key(tmp_path: Path) -> None:
    fusion = fusion_of_one(tmp_path / "fusion")
    path = Path(fusion.specialists[0].model) / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(FusionError, match=r"^specialists\.0\.model: .* sees and is quantised; name the model it was"):
        materialize(fusion, tmp_path / "cache")
    path.write_text(json.dumps(content | {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}))
    with pytest.raises(
        FusionError, match=r"^specialists\.0\.model: is a multimodal model \(llava; of these, Gemma 3 is"
    ):
        inspect_fusion(materialize(fusion, tmp_path / "cache"))


def test_a_folder_without_weights_of_a_text_part_is_refused(tmp_path: Path) -> None:
    fusion = fusion_of_one(tmp_path / "fusion")
    save_file({"vision_tower.weight": torch.zeros(1)}, Path(fusion.specialists[0].model) / "model.safetensors")
    with pytest.raises(FusionError, match=r"^specialists\.0\.model: .* has no weights of a text part"):
        materialize(fusion, tmp_path / "cache", on_progress=lambda *_: None)
