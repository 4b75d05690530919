"""The computed numbers of docs/scaling.md, worked out again from the columns beside them."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from ultrafuser.gating.model.fusion import preset_names

PAGE = (Path(__file__).parent.parent.parent / "docs" / "scaling.md").read_text()
BYTES = 2
"""Of a number in bfloat16."""


def rows(num_columns: int) -> dict[str, list[str]]:
    """The rows of the table with so many columns, by the cells that name them."""
    lines = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    cells = [[cell.strip(" `") for cell in line] for line in lines if len(line) == num_columns]
    return {" ".join(row[: 5 if num_columns == 10 else 2]): row for row in cells}


FUSIONS = {row[0]: [float(cell) for cell in row[1:]] for row in rows(9).values()}
SERVERS = rows(7)
SPECULATIONS = rows(10)


@pytest.mark.parametrize("name", FUSIONS)
def test_weights_and_cache_follow_from_the_models_shapes(name: str) -> None:
    specialists, layers, kv_heads, head_size, billions, billions_read, weights_gb, kv_bytes = FUSIONS[name]
    assert billions_read <= billions
    assert weights_gb == round(specialists * billions * BYTES, 1)
    assert kv_bytes == specialists * 2 * layers * kv_heads * head_size * BYTES


def test_a_mixtures_parameters_are_those_of_its_published_shape() -> None:
    """The numbers that the configurations of both Qwen3-30B-A3B models state."""
    config = Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        vocab_size=151936,
        tie_word_embeddings=False,
    )
    config.update({"head_dim": 128})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = model.num_parameters()
    experts = sum(own.numel() for name, own in model.named_parameters() if ".experts." in name)
    read = total - experts + experts * config.num_experts_per_tok // config.num_experts
    _, layers, kv_heads, head_size, billions, billions_read, _, _ = FUSIONS["qwen3-30b-a3b"]
    assert (layers, kv_heads, head_size) == (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    assert (billions, billions_read) == (round(total / 1e9, 3), round(read / 1e9, 3))


@pytest.mark.parametrize("server", SERVERS)
def test_floor_and_room_follow_from_weights_and_gpus(server: str) -> None:
    name, gpus, *cells = SERVERS[server]
    memory_gb, bandwidth, floor_ms, kilotokens, requests = (float(cell) for cell in cells)
    specialists, _, _, _, billions, billions_read, _, kv_bytes = FUSIONS[name]
    weights_gb, read_gb = specialists * billions * BYTES, specialists * billions_read * BYTES
    num_gpus = int(gpus.split()[0])
    tokens = (num_gpus * (0.9 * memory_gb - 3) - weights_gb) * 1e9 / kv_bytes
    assert floor_ms == round(1000 * read_gb / (num_gpus * bandwidth), 1)
    assert kilotokens == tokens // 1000
    assert requests == tokens // 2048


@pytest.mark.parametrize("case", SPECULATIONS)
def test_what_drafts_gain_follows_from_how_often_they_are_right(case: str) -> None:
    name, gpus, *cells = SPECULATIONS[case]
    teraflops, share, num_drafts, tokens, without_ms, with_ms, one_ms, requests = map(float, cells)
    specialists, *_, billions, _, _, _ = FUSIONS[name]
    bandwidth = float(SERVERS[f"{name} {gpus}"][3])
    exact_one_ms = 1000 * billions * BYTES / (int(gpus.split()[0]) * bandwidth)
    expected = sum(share**power for power in range(int(num_drafts) + 1))
    assert (one_ms, tokens) == (round(exact_one_ms, 1), round(expected, 2))
    assert without_ms == float(SERVERS[f"{name} {gpus}"][4])
    assert with_ms == round((num_drafts + specialists) * exact_one_ms / expected, 1)
    assert requests == teraflops * 1000 / bandwidth // (1 + num_drafts)


def test_there_are_tables_and_they_say_that_they_are_computed() -> None:
    assert FUSIONS.keys() == set(preset_names())
    assert len(SERVERS) > 8
    assert len(SPECULATIONS) == 6
    assert "Every number in this page's tables is computed" in PAGE
    (quoted,) = re.findall(r"one H200 \((\d+) each\)", PAGE)
    assert SERVERS["qwen2.5-7b 1 x H200"][-1] == quoted


def test_a_thousand_replicas_are_a_thousand_times_one() -> None:
    plan = PAGE.partition("## A thousand replicas")[2]
    table = dict(re.findall(r"^\| ([a-z GB]+?)(?: =|,| to load).* \| ([\d.]+ \| \d+) \|$", plan, re.MULTILINE))
    found = {name: tuple(map(float, cells.split(" | "))) for name, cells in table.items()}
    at_once, tokens = float(SERVERS["qwen2.5-7b 1 x H100"][-1]), 256
    weights_gb = FUSIONS["qwen2.5-7b"][6]
    assert found["tokens a second"][0] == round(at_once / 0.02)
    assert found["answers a second"][0] == round(found["tokens a second"][0] / tokens, 1)
    assert found["GB of weights"][0] == weights_gb
    assert len(found) == 5
    for one, thousand in found.values():
        assert thousand == pytest.approx(1000 * one, rel=0.001)
    hours_by_one, minutes_to_read = 1000 * 3 / 60, 1000 * weights_gb / 10 / 60
    assert f"{minutes_to_read:.0f} minutes" in plan
    assert f"{hours_by_one:.0f} hours" in plan
    assert f"{50 * 24 * 60 / 1000:.0f} minutes" in plan
    assert f"{-(-1000 // 16)} of them" in plan
