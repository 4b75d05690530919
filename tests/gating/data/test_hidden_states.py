"""Cached hidden states: those that the specialists give, in the rows' own order, computed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.data.batches import collate_hidden_states, collate_rows
from ultrafuser.gating.data.conversations import DataFile
from ultrafuser.gating.data.encoded_rows import Rows, load_rows
from ultrafuser.gating.data.encoding import ConversationEncoder
from ultrafuser.gating.data.hidden_states import CachedHiddenStates, HiddenStateSource, cache_hidden_states
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.responses import response_states

NAMES = ("text", "code", "math")
# float32 sums of differently padded batches, at hidden states of about 1.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def rows(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    fusion = load_fusion(tiny_path)
    tokenizers = [AutoTokenizer.from_pretrained(item.model) for item in fusion.specialists]
    encoder = ConversationEncoder(fusion, tokenizers, num_shared_ids=320, max_length=1024)
    files = [DataFile.parse(str(CONVERSATIONS))]
    return load_rows(files, encoder, key={}, cache_dir=tmp_path_factory.mktemp("rows"))


def sources(tiny_path: Path, loaded: list[str]) -> list[HiddenStateSource]:
    def load(name: str) -> Any:
        loaded.append(name)
        return AutoModelForCausalLM.from_pretrained(tiny_path.parent / name).requires_grad_(False).eval()

    return [
        HiddenStateSource(name, name, lambda name=name: load(name), torch.float32, 64, index)  # type: ignore[misc]
        for index, name in enumerate(NAMES)
    ]


def compute(
    tiny_path: Path, rows: Rows, cache: Path, loaded: list[str]
) -> tuple[CachedHiddenStates, list[torch.Tensor]]:
    return cache_hidden_states(
        rows.dataset, sources(tiny_path, loaded), num_shared_ids=320, batch_size=7, device=torch.device("cpu"),
        cache_dir=cache,
    )  # fmt: skip


def test_each_rows_states_are_those_of_the_row_alone(tiny_path, rows, tmp_path):
    states, output_weights = compute(tiny_path, rows, tmp_path, [])
    assert len(states) == 30
    for index, name in enumerate(NAMES):
        model = AutoModelForCausalLM.from_pretrained(tiny_path.parent / name).requires_grad_(False)
        assert torch.equal(output_weights[index], model.lm_head.weight[:320])
        for row in (0, 9, 17, 29):
            batch = collate_rows([rows.dataset[row]])
            tensors = [batch[key][index] for key in ("input_ids", "attention_mask", "response_mask")]
            wanted = response_states(model, *tensors)
            found, labels, _ = states[row]
            torch.testing.assert_close(found[index], wanted, atol=TOLERANCE, rtol=0)
            assert torch.equal(labels, batch["labels"])


def test_a_batch_of_cached_rows_lines_up_with_a_batch_of_encoded_rows(tiny_path, rows, tmp_path):
    states, _ = compute(tiny_path, rows, tmp_path, [])
    chosen = [4, 29, 11]
    cached = collate_hidden_states([states[row] for row in chosen])
    whole = collate_rows([rows.dataset[row] for row in chosen])
    assert torch.equal(cached["labels"], whole["labels"])
    assert [tensor.shape for tensor in cached["hidden_states"]] == [(len(whole["labels"]), 64)] * 3


def test_states_are_computed_once_one_specialist_after_the_other(tiny_path, rows, tmp_path):
    loaded: list[str] = []
    first, _ = compute(tiny_path, rows, tmp_path, loaded)
    again, _ = compute(tiny_path, rows, tmp_path, loaded)
    assert loaded == list(NAMES)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first[3][0], again[3][0], strict=True))


def test_other_rows_are_other_states(tiny_path, rows, tmp_path):
    loaded: list[str] = []
    compute(tiny_path, rows, tmp_path, loaded)
    some = Rows(rows.dataset.select(range(5)), (), {})
    states, _ = compute(tiny_path, some, tmp_path, loaded)
    assert loaded == [*NAMES, *NAMES]
    assert len(states) == 5
