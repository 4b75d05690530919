"""A fused model by Transformers' Auto classes, alone and in a fresh process, and its `generate` for raw text."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from tests.draft_heads import write_random_head
from tests.fakes import write_tiny_fusion
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.raw_text import FusedCache
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.model.schema import EngineSettings, SpeculationSettings

KINDS = ("random", "smoothed", "joint+probabilities+scaled+smoothed")
ROWS = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10], [21, 22, 23, 24, 25, 26, 27, 28]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
TOLERANCE = 5e-4
"""Of logits of about 20, in float32, summed in another order."""

ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
ids = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)
model.save_pretrained(sys.argv[2])
print(json.dumps(ids.tolist()))
"""


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return UltraFuserForCausalLM.from_fusion(load_fusion(write_tiny_fusion(tmp_path, gate=request.param)))


def alone(source: Path, target: Path) -> list[list[int]]:
    """In a process that has imported nothing of ours: tokens, and the model saved again."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(target.parent / "modules")}
    command = [sys.executable, "-c", ALONE, str(source), str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_saved_model_is_loaded_and_saved_again_by_processes_that_know_only_auto_classes(tmp_path: Path) -> None:
    model: Any = UltraFuserForCausalLM.from_fusion(
        load_fusion(write_tiny_fusion(tmp_path / "fusion", gate="joint+scaled"))
    )
    wanted = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False).tolist()
    model.save_pretrained(tmp_path / "first")
    assert alone(tmp_path / "first", tmp_path / "second") == wanted
    assert alone(tmp_path / "second", tmp_path / "third") == wanted
    assert json.loads((tmp_path / "third" / "config.json").read_text())["gate_kind"] == "joint+scaled"
    assert sorted(path.name for path in (tmp_path / "third").glob("*.py")) == ["modeling_ultrafuser.py"]


def test_two_folders_in_one_process_are_each_what_they_say(tmp_path: Path) -> None:
    for kind in ("random", "joint"):
        path = write_tiny_fusion(tmp_path / kind, gate=kind)
        model: Any = UltraFuserForCausalLM.from_fusion(load_fusion(path))
        model.save_pretrained(tmp_path / f"{kind}-saved")
        with torch.no_grad():
            wanted = model(ROWS, MASK).logits
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-saved", trust_remote_code=True)
        assert str(loaded.fusion_gate.kind) == ("paper" if kind == "random" else kind)
        with torch.no_grad():
            assert torch.equal(loaded(ROWS, MASK).logits, wanted)


def test_raw_text_is_read_as_one_response_of_all_specialists(model: Any) -> None:
    """The same tokens behind one token of a prompt, by the way that conversations are read."""
    row = ROWS[1:]
    is_response = torch.arange(8)[None] > 0
    with torch.no_grad():
        text = model(row, labels=row)
        wanted = model([row] * 3, [torch.ones_like(row)] * 3, [is_response] * 3)
    torch.testing.assert_close(text.logits[:, :-1], wanted.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(text.gate_weights[:, :, :-1], wanted.gate_weights, atol=1e-4, rtol=0)
    torch.testing.assert_close(text.loss, wanted.loss, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rules", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=str)
def test_generate_says_the_same_with_a_cache_as_without_also_of_padded_rows(model: Any, rules: dict[str, int]) -> None:
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        settings = {"do_sample": False, **rules}
        found.append(model.generate(ROWS, attention_mask=MASK, max_new_tokens=8, use_cache=use_cache, **settings))
    assert torch.equal(found[0], found[1])
    if not rules:
        unpadded = model.generate(ROWS[:1, 2:], max_new_tokens=8, do_sample=False)
        assert unpadded[0].tolist() == found[0][0, 2:].tolist()


def test_a_cache_that_a_caller_keeps_goes_on_where_it_stopped(model: Any) -> None:
    cache = FusedCache([own.config for own in model.specialists])
    with torch.no_grad():
        whole = model(ROWS, MASK)
        parts = [
            model(ROWS[:, begin:end], MASK[:, :end], past_key_values=cache).logits
            for begin, end in ((0, 4), (4, 5), (5, 8))
        ]
        last = model(ROWS, MASK, logits_to_keep=1)
    torch.testing.assert_close(torch.cat(parts, dim=1)[1], whole.logits[1], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(torch.cat(parts, dim=1)[0, 2:], whole.logits[0, 2:], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(last.logits, whole.logits[:, -1:], atol=TOLERANCE, rtol=0)


def test_what_was_trained_is_loaded_alone_with_its_adapters(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where adapters are merged
    folder = run(stage=2, steps=2).parent
    model: Any = UltraFuserForCausalLM.from_pretrained(folder)
    wanted = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False).tolist()
    assert alone(folder, tmp_path / "saved") == wanted
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer("Hello").input_ids
        == AutoTokenizer.from_pretrained(model.specialists[0].name_or_path)("Hello").input_ids
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"input_ids": torch.tensor([[5, 321]])}, "input_ids: 321 is not one of the 320 shared ids"),
        ({"input_ids": ROWS, "labels": ROWS + 300}, "labels: 328 is not one of"),
        ({"input_ids": ROWS, "attention_mask": MASK[:, 1:]}, r"attention_mask: is \(2, 7\), need \(2, 8\)"),
        ({"input_ids": ROWS, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}, "packed into one row"),
        ({"input_ids": ROWS, "past_key_values": DynamicCache()}, "need a FusedCache, got DynamicCache"),
        ({"input_ids": [ROWS] * 3}, "needed for one sequence per specialist"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_model, arguments, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        tiny_model(**arguments)


def test_a_fusions_folder_is_loaded_as_it_lies(tmp_path: Path) -> None:
    path = write_tiny_fusion(tmp_path / "fusion")
    loaded = UltraFuserForCausalLM.from_pretrained(path.parent, dtype="float32", device_map="cpu")
    with torch.no_grad():
        wanted = UltraFuserForCausalLM.from_fusion(load_fusion(path))(ROWS, MASK)
        assert torch.equal(loaded(ROWS, MASK).logits, wanted.logits)
    for options, complaint in (
        ({"device_map": "auto"}, "device_map: name one device"),
        ({"load_in_8bit": True}, "load_in_8bit: no option"),
        ({"dtype": "auto"}, "dtype: name one"),
    ):
        with pytest.raises(ValueError, match=complaint):
            UltraFuserForCausalLM.from_pretrained(path.parent, **options)


def test_a_fusion_made_of_a_changed_model_is_checked_and_loaded_without_the_draft_head_before(tmp_path: Path) -> None:
    """It kept the draft head of the fusion it came from, which is of another gate: nothing could load it."""
    path = write_tiny_fusion(tmp_path / "fusion", gate="joint+scaled+smoothed")
    head = str(write_random_head(path, tmp_path / "head"))
    like = load_fusion(path)
    speculation = SpeculationSettings(drafter="head", path=head, max_tokens=3)
    like = like.model_copy(update={"engine": EngineSettings(speculation=speculation)})
    model: Any = UltraFuserForCausalLM.from_fusion(like)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.001)
    made = load_fusion(model.save_as_fusion(tmp_path / "made", like=like))
    assert made.engine.speculation == SpeculationSettings(max_tokens=3)
    after = UltraFuserForCausalLM.from_fusion(made).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


@pytest.mark.long
def test_the_page_s_example_with_trls_trainer_moves_all_and_makes_a_fusion(run, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("trl", reason="needs TRL: pip install trl")
    (tmp_path / "trained").mkdir()
    run(stage=1, steps=2, output=str(tmp_path / "trained" / "stage1"))
    rows = [json.dumps({"text": f"Two and {number} are {number + 2}. " * 3}) for number in range(20)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    (example,) = (block for block in page.split("```python\n")[1:] if "FusedSFTTrainer" in block)
    example = example.split("```")[0].replace(
        "max_steps=100", "max_steps=3, report_to='none', use_cpu=True, bf16=False"
    )
    exec(compile(example, "docs/training.md", "exec"), {"__name__": "example"})
    before, after = (
        UltraFuserForCausalLM.from_fusion(load_fusion(tmp_path / "trained" / name / "fusion.yaml")).state_dict()
        for name in ("stage1", "sft")
    )
    assert before.keys() == after.keys()
    same = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
    assert not same
