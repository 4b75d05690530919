"""A draft head's folder: what it holds, and what stops a start by name before any weight is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.draft_heads import config_for
from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.draft_head import DraftHead, attend, load_draft_head, rotate, save_draft_head
from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion, save_fusion


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_head_loads_as_it_was(tiny_path: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    head = DraftHead(config_for(tiny_path))
    head.draft_ids_V.copy_(torch.arange(20, 320))
    save_draft_head(head, tmp_path / "head", dtype)
    loaded = load_draft_head(tmp_path / "head")
    assert loaded.config == head.config
    for name, tensor in head.state_dict().items():
        own = loaded.state_dict()[name]
        assert torch.equal(own, tensor.to(own.dtype))
        assert own.dtype == (dtype if tensor.is_floating_point() else torch.int64)


def test_a_head_that_fits_is_accepted_and_its_path_is_the_files_own(with_head: Path, tmp_path: Path) -> None:
    for weights in with_head.parent.glob("*/model.safetensors"):
        if weights.parent.name != "head":
            save_file({"others": torch.zeros(1)}, weights)
    fusion = load_fusion(with_head)
    assert inspect_fusion(fusion).num_shared_ids == 320, "no weight is read"
    assert fusion.engine.speculation is not None
    assert fusion.engine.speculation.path == str(with_head.parent / "head")
    save_fusion(fusion, with_head)
    assert yaml.safe_load(with_head.read_text())["engine"]["speculation"]["path"] == "./head"
    assert load_fusion(with_head) == fusion


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_weights(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in changes.items():
            name = name.replace("__", ".")
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
        save_file(tensors, folder / "model.safetensors")

    return change


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (edit_config(specialists=["text", "math", "code"]), "specialists: the head was trained for"),
        (edit_config(hidden_sizes=[64, 64, 32]), "hidden_sizes: the head was trained for (64, 64, 32), the fusion has"),
        (edit_config(hidden_sizes=[64, 64]), "specialists: 3 names for 2 hidden_sizes"),
        (edit_config(vocabulary="0" * 64), "vocabulary: the head was trained for 000"),
        (edit_config(gate="0" * 64), "gate: the head was trained for 000"),
        (edit_config(format="another"), "config.json: format: Input should be 'ultrafuser-draft-head-v1'"),
        (edit_config(num_heads=3, num_kv_heads=2), "num_heads: 3 is no multiple of num_kv_heads, 2"),
        (edit_config(head_size=31), "head_size: 31 is odd"),
        (edit_config(num_draft_ids=8), "draft_ids_V: shape is (300,), need (8,)"),
        (edit_weights(mix__weight=None), "mix.weight: shape is None, need (64, 64)"),
        (edit_weights(extra=torch.zeros(2)), "extra: shape is (2,), need None"),
        (edit_weights(output__weight=torch.zeros(300, 65)), "output.weight: shape is (300, 65), need (300, 64)"),
        (edit_config(rope_theta=0), "config.json: rope_theta: Input should be greater than or equal to 1"),
        (edit_config(rope_theta=-10.0), "config.json: rope_theta: Input should be greater than or equal to 1"),
        (edit_config(rope_theta="inf"), "config.json: rope_theta: Input should be a finite number"),
        (edit_weights(draft_ids_V=torch.arange(300.0)), "draft_ids_V: token ids must be whole numbers of 32 or 64"),
        (edit_weights(draft_ids_V=torch.arange(300).flip(0)), "draft_ids_V: token ids must ascend, each named once"),
        (edit_weights(draft_ids_V=torch.arange(300).clamp(max=298)), "draft_ids_V: token ids must ascend"),
        (edit_weights(draft_ids_V=torch.arange(21, 321)), "draft_ids_V: token ids 21 to 320 are not all of the 320"),
        (edit_weights(draft_ids_V=torch.arange(-1, 299)), "draft_ids_V: token ids -1 to 298 are not all of the 320"),
        (edit_weights(mix__weight=torch.full((64, 64), torch.nan)), "mix.weight: holds a value that is not finite;"),
        (edit_weights(output_norm__weight=torch.full((64,), torch.inf)), "output_norm.weight: holds a value that is"),
        (edit_weights(mix__weight=torch.zeros(64, 64).int()), "mix.weight: weights must be float32, bfloat16 or"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors: not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors; copy the whole folder"),
        (lambda folder: (folder / "config.json").unlink(), "no draft head there, as it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: "),
    ],
)
def test_a_head_that_does_not_fit_stops_the_start_by_name(
    with_head: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    damage(with_head.parent / "head")
    with pytest.raises(FusionError) as caught:
        inspect_fusion(load_fusion(with_head))
    assert str(caught.value).startswith("engine.speculation.path: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_for_another_gate_or_other_tokens_is_refused(with_head: Path) -> None:
    content = yaml.safe_load(with_head.read_text())
    with_head.write_text(yaml.safe_dump({**content, "gate": "package:fresh"}))
    with pytest.raises(
        FusionError, match=r"^engine\.speculation\.path: .*gate: the head was trained for .* has fresh; "
    ):
        inspect_fusion(load_fusion(with_head))


def test_drafts_that_are_off_need_no_head(with_head: Path) -> None:
    (with_head.parent / "head" / "config.json").unlink()
    content = yaml.safe_load(with_head.read_text())
    content["engine"]["speculation"]["max_tokens"] = 0
    with_head.write_text(yaml.safe_dump(content))
    assert inspect_fusion(load_fusion(with_head)).num_shared_ids == 320


@pytest.mark.parametrize("speculation", [{"drafter": "head"}, {"drafter": "ngram", "path": "head"}])
def test_a_path_belongs_to_a_head_and_a_head_to_its_path(tiny_copy: Path, speculation: dict[str, Any]) -> None:
    content = yaml.safe_load(tiny_copy.read_text())
    content["engine"]["speculation"] = speculation
    tiny_copy.write_text(yaml.safe_dump(content))
    with pytest.raises(FusionError, match=r"^engine\.speculation\.path: is "):
        load_fusion(tiny_copy)


def test_positions_turn_keys_so_that_scores_depend_on_distances_alone() -> None:
    torch.manual_seed(0)
    queries_BHE, keys_BHE = torch.randn(2, 5, 3, 8)
    positions_B = torch.arange(5)
    near, far = (
        (rotate(queries_BHE, positions_B + shift, 100.0) * rotate(keys_BHE, 2 + positions_B + shift, 100.0)).sum(-1)
        for shift in (0, 40)
    )
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    moved = (rotate(queries_BHE, positions_B, 100.0) * rotate(keys_BHE, 3 + positions_B, 100.0)).sum(-1)
    assert not torch.allclose(near, moved, atol=1e-2)


def test_attention_is_the_papers_formula_over_what_is_seen() -> None:
    torch.manual_seed(0)
    queries_BKGE, keys_BCKE, values_BCKE = torch.randn(2, 1, 3, 4), torch.randn(2, 5, 1, 4), torch.randn(2, 5, 1, 4)
    is_seen_BC = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]).bool()
    found = attend(queries_BKGE, keys_BCKE, values_BCKE, is_seen_BC).view(2, 3, 4)
    for row in range(2):
        keys, values = keys_BCKE[row, is_seen_BC[row], 0], values_BCKE[row, is_seen_BC[row], 0]
        wanted = (queries_BKGE[row, 0] @ keys.T).softmax(dim=-1) @ values
        torch.testing.assert_close(found[row], wanted)
