"""The reference's generate: the same tokens however it is computed, and vLLM's sampling rules by hand."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

from tests.fakes import EOS_ID, build_tokenizer, write_tiny_fusion
from ultrafuser.gating.model.decoding import DecodingRules, apply_penalties, sampling_distribution
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

QUESTIONS = ("Hello there", "What is 2+2?", "Tell me a very long story about a dog, please.", "x")
# See test_reference.py: logits of about 20 in float32, summed in another order.
LOGPROB_TOLERANCE = 5e-4


def prompts_of(fusion_path: Path, questions: Sequence[str] = QUESTIONS) -> list[list[list[int]]]:
    """prompts[b][s]: each question in each specialist's own template."""
    tokenizer = build_tokenizer(320, 320, "text")
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_generation_prompt": True}
    prompts = []
    for question in questions:
        texts = [
            render_jinja_template(
                [[{"role": "user", "content": question}]], chat_template=specialist.chat_template, **special
            )[0][0]
            for specialist in load_fusion(fusion_path).specialists
        ]
        prompts.append([tokenizer.encode(text, add_special_tokens=False) for text in texts])
    return prompts


def test_greedy_outputs_vary_with_the_prompt_and_have_a_clear_winner_at_every_step(tiny_path, tiny_model):
    generations = tiny_model.respond(prompts_of(tiny_path), max_new_tokens=40, use_cache=True)
    assert len({tuple(generation.token_ids[:10]) for generation in generations}) == len(QUESTIONS)
    assert all(len(set(generation.token_ids)) > 15 for generation in generations)
    assert min(float(generation.top2_gap.min()) for generation in generations) > 1e-3
    weights = torch.cat([generation.gate_weights for generation in generations])
    assert float(weights.std(dim=0).min()) > 0.1, "the gate must favour different specialists at different tokens"


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_batch_gives_what_each_request_gives_alone(tiny_path, tiny_model, use_cache):
    prompts = prompts_of(tiny_path)
    batched = tiny_model.respond(prompts, max_new_tokens=24, use_cache=use_cache)
    for prompt, together in zip(prompts, batched, strict=True):
        (alone,) = tiny_model.respond([prompt], max_new_tokens=24)
        assert together.token_ids == alone.token_ids
        torch.testing.assert_close(together.logprobs, alone.logprobs, atol=LOGPROB_TOLERANCE, rtol=0)
        torch.testing.assert_close(together.gate_weights, alone.gate_weights, atol=LOGPROB_TOLERANCE, rtol=0)


def test_cached_and_recomputed_steps_agree_also_after_some_requests_ended(tiny_path, tiny_model):
    prompts = prompts_of(tiny_path)
    free = tiny_model.respond(prompts, max_new_tokens=24)
    # The first request's fifth token ends whoever says it.
    ends = [free[0].token_ids[4], EOS_ID]
    recomputed = tiny_model.respond(prompts, max_new_tokens=24, eos_token_ids=ends)
    cached = tiny_model.respond(prompts, max_new_tokens=24, eos_token_ids=ends, use_cache=True)
    lengths = [len(generation.token_ids) for generation in recomputed]
    assert lengths[0] <= 5 < max(lengths)
    for one, other in zip(recomputed, cached, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=LOGPROB_TOLERANCE, rtol=0)


def test_an_end_token_stays_in_the_output_and_ends_it(tiny_path, tiny_model):
    prompts = prompts_of(tiny_path, QUESTIONS[:1])
    (free,) = tiny_model.respond(prompts, max_new_tokens=8)
    (ended,) = tiny_model.respond(prompts, max_new_tokens=8, eos_token_ids=[free.token_ids[3]])
    first = free.token_ids.index(free.token_ids[3])
    assert ended.token_ids == free.token_ids[: first + 1]
    assert ended.logprobs.shape == (first + 1, 320)
    assert ended.gate_weights.shape == (first + 1, 3)
    assert ended.top2_gap.shape == (first + 1,)


@pytest.mark.parametrize("name", ["text", "code", "math"])
def test_a_closed_gate_gives_what_plain_transformers_gives_for_that_specialist(tmp_path, name):
    path = write_tiny_fusion(tmp_path, gate=f"closed:{name}")
    index = ("text", "code", "math").index(name)
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    plain: Any = LlamaForCausalLM.from_pretrained(path.parent / name)
    unshared = list(range(320, plain.config.vocab_size)) or None
    for prompt in prompts_of(path):
        (generation,) = model.respond([prompt], max_new_tokens=24, eos_token_ids=[EOS_ID])
        ids = torch.tensor([prompt[index]])
        output = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            suppress_tokens=unshared,
        )
        assert generation.token_ids == output[0, ids.shape[1] :].tolist()


def test_a_single_specialist_is_decoded_as_plain_transformers_does(tmp_path):
    path = write_tiny_fusion(tmp_path, names=("text",), gate="none")
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    plain: Any = LlamaForCausalLM.from_pretrained(path.parent / "text")
    prompt = torch.tensor([[5, 6, 7, 8]])
    (generation,) = model.respond([prompt.tolist()], max_new_tokens=16, eos_token_ids=[EOS_ID])
    output = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
    assert generation.token_ids == output[0, 4:].tolist()
    assert torch.equal(generation.gate_weights, torch.ones(len(generation.token_ids), 1))


def test_raw_logprobs_are_taken_before_the_penalties(tiny_path, tiny_model):
    prompts = prompts_of(tiny_path, QUESTIONS[:1])
    (free,) = tiny_model.respond(prompts, max_new_tokens=1)
    (pushed,) = tiny_model.respond(prompts, max_new_tokens=1, logit_bias={99: 100.0})
    assert pushed.token_ids == [99]
    assert torch.equal(free.logprobs, pushed.logprobs)
    assert float(pushed.top2_gap[0]) > 50


def test_penalties_change_the_output_and_min_tokens_delays_its_end(tiny_path, tiny_model):
    prompts = prompts_of(tiny_path)
    free = [generation.token_ids for generation in tiny_model.respond(prompts, max_new_tokens=16)]
    for penalty in ({"repetition_penalty": 2.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        penalised = [g.token_ids for g in tiny_model.respond(prompts, max_new_tokens=16, **penalty)]
        assert penalised != free, penalty
    ends = [free[0][0]]
    assert tiny_model.respond(prompts[:1], max_new_tokens=8, eos_token_ids=ends)[0].token_ids == ends
    delayed = tiny_model.respond(prompts[:1], max_new_tokens=8, eos_token_ids=ends, min_tokens=4)[0].token_ids
    assert len(delayed) >= 4
    assert ends[0] not in delayed[:4]


def test_the_repetition_penalty_looks_at_the_leaders_own_prompt(tiny_model):
    # The bias makes 99 the likeliest token by far; only a penalty on 99 can take that away.
    rules: dict[str, Any] = {"max_new_tokens": 1, "repetition_penalty": 50.0, "logit_bias": {99: 60.0}}
    (of_leader,) = tiny_model.respond([[[5, 99], [6, 7], [8, 9]]], **rules)
    (of_others,) = tiny_model.respond([[[5, 7], [6, 99], [99, 9]]], **rules)
    assert of_leader.token_ids != [99]
    assert of_others.token_ids == [99]


def test_penalties_equal_a_hand_computation():
    logits = torch.tensor([4.0, -4.0, 1.0, 1.0, 0.5, -1.0])
    rules = DecodingRules(
        max_new_tokens=1, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={4: 1.5}
    )
    # Prompt: 0 and 1 (and 9, which is not shared). Output: 2 twice, 4 once.
    penalised = apply_penalties(logits, [0, 1, 9], [2, 2, 4], rules)
    wanted = [
        4.0 / 2,
        -4.0 * 2,
        1.0 / 2 - 2 * 0.5 - 0.25,
        1.0,
        (0.5 + 1.5) / 2 - 0.5 - 0.25,
        -1.0,
    ]
    assert penalised.tolist() == wanted
    assert logits[0] == 4.0


def test_end_tokens_are_forbidden_until_min_tokens():
    rules = DecodingRules(max_new_tokens=9, min_tokens=2, eos_token_ids=[1])
    logits = torch.tensor([0.0, 5.0])
    assert apply_penalties(logits, [0], [0], rules).tolist() == [0.0, -math.inf]
    assert apply_penalties(logits, [0], [0, 0], rules).tolist() == [0.0, 5.0]


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": -1}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),  # in float32 the whole sum is not above 1 - top_p
        ({"min_p": 0.4}, [2 / 3, 1 / 3, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        # top_p is taken of what top_k left, min_p before both.
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        ({"min_p": 0.25, "top_p": 0.55}, [1, 0, 0, 0]),
        ({"temperature": 0.5, "min_p": 0.2}, [0.8, 0.2, 0, 0]),
    ],
)
def test_the_sampling_distribution_equals_a_hand_computation(rules, wanted):
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    distribution = sampling_distribution(logits, DecodingRules(max_new_tokens=1, **rules))
    torch.testing.assert_close(distribution, torch.tensor(wanted, dtype=torch.float32), atol=1e-6, rtol=0)


def test_ties_at_the_k_th_token_are_all_kept():
    distribution = sampling_distribution(torch.tensor([2.0, 1.0, 1.0, 0.0]), DecodingRules(max_new_tokens=1, top_k=2))
    assert int((distribution > 0).sum()) == 3


def test_drawn_tokens_follow_the_fused_distribution(tiny_model):
    prompts = [[[5, 6, 7], [8, 9], [10]]]
    rules: dict[str, Any] = {"max_new_tokens": 1, "do_sample": True, "temperature": 4.0, "top_k": 8}
    generator = torch.Generator().manual_seed(5)
    num_draws = 4000
    draws = tiny_model.respond(prompts * num_draws, generator=generator, use_cache=True, **rules)
    counts = torch.bincount(torch.tensor([draw.token_ids[0] for draw in draws]), minlength=320)
    (one,) = tiny_model.respond(prompts, max_new_tokens=1)
    expected = sampling_distribution(one.logprobs[0], DecodingRules(**rules)) * num_draws
    kept = expected > 0
    assert int(counts[~kept].sum()) == 0
    chi_square = float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    # 99.99 % point of the chi-square distribution with 7 degrees of freedom; the seed is fixed.
    assert chi_square < 29.9


def test_the_same_seed_draws_the_same_tokens(tiny_path, tiny_model):
    prompts = prompts_of(tiny_path)
    runs = [
        tiny_model.respond(
            prompts, max_new_tokens=8, do_sample=True, temperature=2.0, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    first, again, other = [[generation.token_ids for generation in run] for run in runs]
    assert first == again != other


@pytest.mark.parametrize(
    ("prompts", "rules", "complaint"),
    [
        ([[[5], [6]]], {}, r"prompts\.0: need 3 prompts of at least one token"),
        ([[[5], [6], [7]], [[5], [], [7]]], {}, r"prompts\.1: need 3 prompts of at least one token"),
        ([], {}, "need at least one request"),
        ([[[5], [6], [7]]], {"max_new_tokens": 0}, "need at least one request and one token"),
        ([[[5], [6], [7]]], {"eos_token_ids": [320]}, "320 is not one of the 320 shared ids"),
        ([[[5], [6], [7]]], {"logit_bias": {400: 1.0}}, "400 is not one of the 320 shared ids"),
        ([[[5], [6], [7]]], {"do_sample": True, "temperature": 0.0}, "temperature: must be above 0"),
    ],
)
def test_requests_that_cannot_be_decoded_are_refused(tiny_model, prompts, rules, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny_model.respond(prompts, **{"max_new_tokens": 4, **rules})


def test_an_unknown_rule_is_refused(tiny_model):
    with pytest.raises(TypeError, match="num_beams"):
        tiny_model.respond([[[5], [6], [7]]], max_new_tokens=1, num_beams=2)
