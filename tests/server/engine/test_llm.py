"""Offline inference: `FusedLLM` takes what vLLM's `LLM` takes, and answers as the fused model."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from transformers import AutoTokenizer
from vllm.exceptions import VLLMValidationError

from tests.fakes import MAX_POSITIONS
from tests.server.engine.harness import greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.templates import fold_messages
from ultrafuser.server.engine.shared.options import EngineOptionError
from ultrafuser.server.errors import ContextTooLong
from ultrafuser.server.llm import FusedLLM


@pytest.fixture(scope="module")
def llm(tiny_fusion: Path) -> Iterator[FusedLLM]:
    """The tiny fusion, offline."""
    with FusedLLM(tiny_fusion) as llm:
        yield llm


def test_generate_takes_text_token_ids_and_own_prompts(llm: FusedLLM, judge: Judge) -> None:
    text = "the fused model reads this"
    token_ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
    own = random_prompts((13, 16, 36), seed=0)
    prompts = [text, {"prompt_token_ids": token_ids}, {"specialist_prompts": own}]
    outputs = llm.generate(prompts, greedy(8), use_tqdm=False)
    expected = [judge.tokens([token_ids] * 3, 8)] * 2 + [judge.tokens(own, 8)]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected


def test_chat_renders_each_specialists_own_prompt(llm: FusedLLM, judge: Judge, tiny_fusion: Path) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "add two and three"}]
    (output,) = llm.chat(messages, greedy(8), use_tqdm=False)
    own: list[Any] = []
    for specialist in load_fusion(tiny_fusion).specialists:
        assert specialist.chat_template is not None
        tokenizer = AutoTokenizer.from_pretrained(specialist.model)
        folded, _ = fold_messages(messages, None, specialist.chat_template)
        own.append(
            tokenizer.apply_chat_template(
                folded, chat_template=specialist.chat_template, add_generation_prompt=True, return_dict=False
            )
        )
    assert len({len(prompt) for prompt in own}) == 3
    assert list(output.outputs[0].token_ids) == judge.tokens(own, 8)
    assert output.prompt_token_ids == max(own, key=len)


def test_a_response_that_does_not_fit_is_cut_and_a_prompt_without_room_refused(llm: FusedLLM) -> None:
    """As the server does it, by vLLM's own rule."""
    prompt = {"prompt_token_ids": [70] * (MAX_POSITIONS - 5)}
    (output,) = llm.generate([prompt], greedy(32_000, min_tokens=10), use_tqdm=False)
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (5, "length")
    (output,) = llm.chat([{"role": "user", "content": "q" * 900}], greedy(32_000), use_tqdm=False)
    room = MAX_POSITIONS - len(output.prompt_token_ids)
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (room, "length")
    own = {"specialist_prompts": [[70] * 10, [70] * MAX_POSITIONS, [70] * 20]}
    for without_room in ({"prompt_token_ids": [70] * MAX_POSITIONS}, own):
        with pytest.raises(VLLMValidationError, match=f"{MAX_POSITIONS}"):
            llm.generate([without_room], greedy(1), use_tqdm=False)
    with pytest.raises(ContextTooLong, match=f"{MAX_POSITIONS} tokens"):
        llm.chat([{"role": "user", "content": "q" * 1000}], greedy(1), use_tqdm=False)


def test_an_unsupported_engine_option_is_refused(tiny_fusion: Path) -> None:
    with pytest.raises(EngineOptionError, match="pipeline_parallel_size"):
        FusedLLM(tiny_fusion, pipeline_parallel_size=2)


def test_completions_carry_the_gates_weights_if_they_are_asked_for(llm: FusedLLM, judge: Judge) -> None:
    own = random_prompts((13, 16, 36), seed=0)
    asked, plain = llm.generate(
        [{"specialist_prompts": own}] * 2, [greedy(8, extra_args={"gate_weights": True}), greedy(8)], use_tqdm=False
    )
    wanted = judge.generation(own, 8).gate_weights
    assert asked.outputs[0].gate_weights == pytest.approx(wanted.numpy(), abs=1e-4)
    assert asked.outputs[0].drafted.tolist() == [False] * 8
    assert (plain.outputs[0].gate_weights, plain.outputs[0].drafted) == (None, None)


TWO_ENGINES = """
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import psutil
from vllm import SamplingParams

from ultrafuser import FusedLLM

for _ in range(2):  # the first start imports and allocates what stays
    print(psutil.Process().memory_info().rss)
    with FusedLLM(sys.argv[1], kv_cache_memory_bytes=2**30) as llm:
        llm.generate("Go on.", SamplingParams(max_tokens=4), use_tqdm=False)
        print(psutil.Process().memory_info().rss)
print(psutil.Process().memory_info().rss)
"""


def test_an_ended_engine_has_given_its_memory_back(tiny_fusion: Path) -> None:
    """The cache was kept to the end of the process: a dozen engines in turn took all of the machine's memory."""
    command = [sys.executable, "-c", TWO_ENGINES, str(tiny_fusion)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    _, _, before, running, after = [int(line) for line in told if line.isdecimal()]
    assert running - before > 2**30 * 0.8  # some of it lay free in the process before
    assert after - before < 2**30 * 0.1


def engine_processes() -> set[psutil.Process]:
    """vLLM's processes below this one; those of servers that other tests share are among them."""
    children = psutil.Process().children(recursive=True)
    return {child for child in children if child.name().startswith("VLLM") and child.status() != psutil.STATUS_ZOMBIE}


@pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning")  # vLLM leaves its sockets' to the collector
def test_its_processes_end_with_it(tiny_fusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it runs by default, in processes of its own."""
    monkeypatch.setattr("vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING", True, raising=False)
    others = engine_processes()
    with FusedLLM(tiny_fusion) as llm:
        (output,) = llm.generate(["Go on."], greedy(4), use_tqdm=False)
        assert len(engine_processes() - others) >= 1
    assert engine_processes() <= others
    assert len(output.outputs[0].token_ids) == 4
    del llm
    gc.collect()
