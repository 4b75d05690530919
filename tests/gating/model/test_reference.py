"""The reference's forward pass, loss and files, held against plain Transformers models and hand computation."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

from tests.fakes import EOS_ID, build_tokenizer, write_tiny_fusion
from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.decoding import left_pad
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.gate_file import load_gate
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

NAMES = ("text", "code", "math")
# float32 sums in another order (padding, batches, chunks) at logits of about 20: measured 6e-5, with room.
LOGIT_TOLERANCE = 5e-4
CONVERSATIONS = (
    [("Hello", "Hi there, friend!"), ("What is 2+3?", "5"), ("Why?", "Because two and three are five.")],
    [("Sort a list.", "sorted(items)"), ("And reversed?", "sorted(items, reverse=True)"), ("Ok", "Bye.")],
    [("One turn", "only.")],
)


def encode(conversation: Sequence[tuple[str, str]], chat_template: str) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation in one template, and which of them are response tokens.

    Each response is encoded alone and ended by EOS; the template gives what surrounds it.
    """
    tokenizer = build_tokenizer(320, 320, "text")
    messages = []
    for index, (question, _) in enumerate(conversation):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": f"@{index}@"}]
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    rest = render_jinja_template([messages], chat_template=chat_template, **special)[0][0]
    ids: list[int] = []
    is_response: list[bool] = []
    for index, (_, response) in enumerate(conversation):
        glue, rest = rest.split(f"@{index}@<|im_end|>")
        glue_ids = tokenizer.encode(glue, add_special_tokens=False)
        response_ids = [*tokenizer.encode(response, add_special_tokens=False), EOS_ID]
        ids += [*glue_ids, *response_ids]
        is_response += [False] * len(glue_ids) + [True] * len(response_ids)
    return ids, is_response


def batch(fusion_path: Path) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """input_ids, attention_mask and response_mask of all conversations, per specialist."""
    inputs, masks, responses = [], [], []
    for specialist in load_fusion(fusion_path).specialists:
        encoded = [encode(conversation, str(specialist.chat_template)) for conversation in CONVERSATIONS]
        ids, mask = left_pad([ids for ids, _ in encoded], torch.device("cpu"))
        inputs.append(ids)
        masks.append(mask)
        responses.append(left_pad([flags for _, flags in encoded], torch.device("cpu"))[0].bool())
    return inputs, masks, responses


def score_by_hand(gate: Gate, hidden_D: Tensor) -> Tensor:
    inner = torch.clamp(gate.hidden.weight @ hidden_D + gate.hidden.bias, min=0)
    return (gate.score.weight @ inner + gate.score.bias)[0]


@torch.no_grad()
def losses_by_hand(fusion_path: Path) -> list[float]:
    """Loss of every response token: plain models, unpadded prefixes, one token at a time, the formula written out."""
    config = load_fusion(fusion_path)
    models = [LlamaForCausalLM.from_pretrained(specialist.model) for specialist in config.specialists]
    gate = load_gate(str(config.gate), NAMES, [64, 64, 64])
    losses = []
    for conversation in CONVERSATIONS:
        encoded = [encode(conversation, str(specialist.chat_template)) for specialist in config.specialists]
        positions = [[index for index, flag in enumerate(flags) if flag] for _, flags in encoded]
        for places in zip(*positions, strict=True):
            scores, logits = [], []
            for model, (ids, _), place in zip(models, encoded, places, strict=True):
                output = model(torch.tensor([ids[:place]]), output_hidden_states=True)
                scores.append(score_by_hand(gate, output.hidden_states[-1][0, -1]))
                logits.append(output.logits[0, -1, :320])
            weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            fused = weights[0] * logits[0] + weights[1] * logits[1] + weights[2] * logits[2]
            token = encoded[0][0][places[0]]
            losses.append(float(fused.exp().sum().log() - fused[token]))
    return losses


def test_the_fused_loss_of_multi_turn_conversations_in_three_templates_equals_a_computation_by_hand(
    tiny_path, tiny_model
):
    wanted = torch.tensor(losses_by_hand(tiny_path))
    inputs, masks, responses = batch(tiny_path)
    with torch.no_grad():
        output = tiny_model(inputs, masks, responses)
    assert len({ids.shape[1] for ids in inputs}) == 3, "the three templates must give different lengths"
    losses = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), output.labels.flatten(), reduction="none")
    torch.testing.assert_close(losses[output.labels.flatten() != -100], wanted, atol=LOGIT_TOLERANCE, rtol=0)
    torch.testing.assert_close(output.loss, wanted.mean(), atol=LOGIT_TOLERANCE, rtol=0)


def test_the_output_covers_every_response_token_and_no_other(tiny_path, tiny_model):
    inputs, masks, responses = batch(tiny_path)
    with torch.no_grad():
        output = tiny_model(inputs, masks, responses)
    for index, conversation in enumerate(CONVERSATIONS):
        tokens = inputs[2][index][responses[2][index]]
        assert torch.equal(output.labels[index][: len(tokens)], tokens)
        assert bool((output.labels[index][len(tokens) :] == -100).all())
        assert tokens.tolist().count(EOS_ID) == len(conversation)
    assert output.logits.shape == (*output.labels.shape, 320)
    torch.testing.assert_close(output.gate_weights.sum(dim=0), torch.ones(output.labels.shape))


def test_labels_leave_tokens_out_of_the_loss(tiny_path, tiny_model):
    inputs, masks, responses = batch(tiny_path)
    with torch.no_grad():
        full = tiny_model(inputs, masks, responses)
        labels = full.labels.clone()
        labels[1:] = -100
        first_only = tiny_model(inputs, masks, responses, labels)
        alone = tiny_model(*[[tensor[:1] for tensor in tensors] for tensors in (inputs, masks, responses)])
    torch.testing.assert_close(first_only.loss, alone.loss, atol=LOGIT_TOLERANCE, rtol=0)
    assert float((first_only.loss - full.loss).abs()) > 0.01


def test_the_loss_teaches_gate_and_specialists(tiny_path):
    model = UltraFuserForCausalLM.from_fusion(load_fusion(tiny_path))
    model(*batch(tiny_path)).loss.backward()
    for name in ("fusion_gate.hidden.weight", "specialists.0.lm_head.weight", "specialists.2.model.norm.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert float(gradient.abs().max()) > 0, name


def test_training_the_gate_alone_moves_nothing_else_and_lowers_the_loss(tiny_path):
    model = UltraFuserForCausalLM.from_fusion(load_fusion(tiny_path))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = batch(tiny_path)
    model.specialists.requires_grad_(False)
    assert model.fusion_gate is not None
    optimizer = torch.optim.AdamW(model.fusion_gate.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(*inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("fusion_gate.") for name in changed)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda inputs, responses: [mask.zero_() for mask in responses], "no response tokens in the batch"),
        (lambda inputs, responses: responses[1][0, :1].fill_(True), "cannot start at the first position"),
        (lambda inputs, responses: inputs[1].add_(1), "response tokens of 'code' differ from the leader's"),
        (lambda inputs, responses: responses[2][:, -1].zero_(), "response tokens of 'math' differ from the leader's"),
    ],
)
def test_responses_that_do_not_line_up_are_refused(tiny_path, tiny_model, change, complaint):
    inputs, masks, responses = batch(tiny_path)
    change(inputs, responses)
    with pytest.raises(ValueError, match=complaint):
        tiny_model(inputs, masks, responses)


def test_a_response_token_outside_the_shared_vocabulary_is_refused(tiny_model):
    ids, mask = left_pad([[5, 6, 321]], torch.device("cpu"))
    response = torch.tensor([[False, False, True]])
    with pytest.raises(ValueError, match="labels: 321 is outside the shared vocabulary"):
        tiny_model([ids] * 3, [mask] * 3, [response] * 3)


@pytest.mark.parametrize("closed_on", [0, 1, 2])
def test_a_closed_gate_gives_one_specialists_logits_bit_for_bit(tmp_path, closed_on):
    path = write_tiny_fusion(tmp_path, gate=f"closed:{NAMES[closed_on]}")
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    inputs, masks, responses = batch(path)
    with torch.no_grad():
        output = model(inputs, masks, responses)
        fused, weights = model.next_token(inputs, masks)
        positions = (masks[closed_on].cumsum(-1) - 1).clamp(min=0)
        alone = model.specialists[closed_on](inputs[closed_on], masks[closed_on], position_ids=positions)
    one_hot = torch.nn.functional.one_hot(torch.tensor(closed_on), 3).float()
    assert torch.equal(weights, one_hot[:, None].expand_as(weights))
    assert torch.equal(output.gate_weights, one_hot[:, None, None].expand_as(output.gate_weights))
    torch.testing.assert_close(fused, alone.logits[:, -1, :320], atol=1e-5, rtol=0)


def gate_by_hand(gate: Gate, states_TSD: Tensor) -> Tensor:
    """Weights [T, S] at one response's states, in float64, one token and one specialist at a time."""
    own = {name: tensor.double() for name, tensor in gate.state_dict().items()}
    joint, smoothed = gate.kind.joint, gate.kind.smoothed
    means_SD = torch.zeros_like(states_TSD[0])
    weights = []
    for states_SD in states_TSD:
        inner = torch.stack([own["hidden.weight"] @ read for read in ([states_SD.flatten()] if joint else states_SD)])
        if smoothed:
            seen = [means_SD.flatten()] if joint else means_SD
            inner += torch.stack([own["memory.weight"] @ read for read in seen])
            decay = 1 / (1 + (-own["decay_logit"]).exp())
            means_SD = decay * means_SD + (1 - decay) * states_SD
        scores = (inner + own["hidden.bias"]).clamp(min=0) @ own["score.weight"].T + own["score.bias"]
        weights.append((scores.flatten() + own.get("biases", 0)).softmax(dim=0))
    return torch.stack(weights)


KINDS = ("joint", "probabilities", "scaled", "smoothed", "joint+probabilities+scaled+smoothed")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_gate_is_its_formula_reset_at_each_response(tmp_path, kind):
    path = write_tiny_fusion(tmp_path, gate=kind)
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    gate = model.fusion_gate
    assert gate is not None
    inputs, masks, responses = batch(path)
    output = model(inputs, masks, responses)
    models = [LlamaForCausalLM.from_pretrained(own.model) for own in load_fusion(path).specialists]
    # The first conversation's rows, without their padding; its three turns of response tokens are three runs.
    ids = [own[0][mask[0].bool()] for own, mask in zip(inputs, masks, strict=True)]
    places = [own[0][mask[0].bool()].nonzero()[:, 0] for own, mask in zip(responses, masks, strict=True)]
    read = [own(own_ids[None], output_hidden_states=True) for own, own_ids in zip(models, ids, strict=True)]
    states = [own.hidden_states[-1][0, place - 1].double() for own, place in zip(read, places, strict=True)]
    logits = [own.logits[0, place - 1, :320].double() for own, place in zip(read, places, strict=True)]
    begins = [0, *((places[0].diff() > 1).nonzero()[:, 0] + 1).tolist(), len(places[0])]
    turns = [torch.stack([own[a:b] for own in states], dim=1) for a, b in itertools.pairwise(begins)]
    assert len(turns) == 3
    weights_TS = torch.cat([gate_by_hand(gate, states_TSD) for states_TSD in turns])
    found_TS = output.gate_weights[:, 0, : len(weights_TS)].T
    torch.testing.assert_close(found_TS.double(), weights_TS, atol=1e-4, rtol=0)
    temperatures = gate.log_temperatures.double().exp() if gate.kind.scaled else torch.ones(3)
    own = torch.stack([row / temperature for row, temperature in zip(logits, temperatures, strict=True)], dim=1)
    if gate.kind.probabilities:
        fused = (weights_TS.unsqueeze(-1) * own.softmax(dim=-1)).sum(dim=1).log()
    else:
        fused = (weights_TS.unsqueeze(-1) * own).sum(dim=1)
    found = output.logits[0, : len(fused)].double()
    torch.testing.assert_close(found, fused, atol=5 * LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_every_kind_of_gate_says_step_by_step_is_what_it_says_of_the_whole(tmp_path, kind, use_cache):
    path = write_tiny_fusion(tmp_path, gate=kind)
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    prompts = [[[5, 6, 7], [8, 9], [11, 12, 13, 14]], [[5], [6], [7]]]
    for prompt, generation in zip(prompts, model.generate(prompts, max_new_tokens=9, use_cache=use_cache), strict=True):
        rows = [torch.tensor([own + generation.token_ids]) for own in prompt]
        is_response = [torch.arange(row.shape[1])[None] >= row.shape[1] - 9 for row in rows]
        with torch.no_grad():
            whole = model(rows, [torch.ones_like(row) for row in rows], is_response)
        torch.testing.assert_close(generation.gate_weights, whole.gate_weights[:, 0].T, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            generation.logprobs, whole.logits[0].log_softmax(dim=-1), atol=LOGIT_TOLERANCE, rtol=0
        )


def test_the_smallest_vocabulary_decides_what_is_fused(tmp_path):
    path = write_tiny_fusion(tmp_path, vocab_sizes=(330, 300, 310))
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    ids, mask = left_pad([[5, 6, 7]], torch.device("cpu"))
    with torch.no_grad():
        fused, weights = model.next_token([ids] * 3, [mask] * 3)
        logits = [specialist(ids).logits[0, -1] for specialist in model.specialists]
    assert [len(row) for row in logits] == [330, 300, 310]
    assert fused.shape == (1, 300)
    wanted = sum(float(weight) * row[:300] for weight, row in zip(weights[:, 0], logits, strict=True))
    torch.testing.assert_close(fused[0], wanted, atol=1e-4, rtol=0)


def test_heterogeneous_widths_are_mixed_through_the_gates_projections(tmp_path):
    path = write_tiny_fusion(tmp_path, hidden_sizes=(64, 96, 32), seed=1)
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    projections = [tuple(model.get_parameter(f"fusion_gate.projections.{index}.weight").shape) for index in range(3)]
    assert projections == [(96, 64), (96, 96), (96, 32)]
    with torch.no_grad():
        output = model(*batch(path))
    assert torch.isfinite(output.loss)
    assert float(output.gate_weights.std(dim=0).mean()) > 0.1


@pytest.mark.parametrize("hidden_sizes", [(64, 64, 64), (64, 96, 64)])
def test_a_saved_model_loads_equal_through_the_auto_classes(tmp_path, hidden_sizes):
    path = write_tiny_fusion(tmp_path / "fusion", hidden_sizes=hidden_sizes)
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, UltraFuserForCausalLM)
    assert loaded.config.specialist_names == list(NAMES)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        inputs = batch(path)
        assert torch.equal(model(*inputs).logits, loaded(*inputs).logits)


def test_a_saved_model_loads_in_bfloat16_with_its_gate_in_float32(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = UltraFuserForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {(name.split(".")[0], tensor.dtype) for name, tensor in loaded.named_parameters()}
    assert dtypes == {("specialists", torch.bfloat16), ("fusion_gate", torch.float32)}
    assert loaded.generate([[[5, 6]] * 3], max_new_tokens=2)[0].logprobs.dtype == torch.float32


def test_tied_output_layers_survive_saving(tmp_path):
    path = write_tiny_fusion(tmp_path / "fusion")
    config = LlamaConfig.from_pretrained(path.parent / "code", tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(path.parent / "code")
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    model.save_pretrained(tmp_path / "saved")
    loaded = UltraFuserForCausalLM.from_pretrained(tmp_path / "saved")
    embedding, output_layer = ("specialists.{}.model.embed_tokens.weight", "specialists.{}.lm_head.weight")
    tied = [loaded.get_parameter(embedding.format(s)) is loaded.get_parameter(output_layer.format(s)) for s in range(3)]
    assert tied == [False, True, False]
    with torch.no_grad():
        inputs = batch(path)
        assert torch.equal(model(*inputs).logits, loaded(*inputs).logits)


def test_an_unmerged_adapter_is_refused(tiny_copy, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"others": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    config = load_fusion(tiny_copy)
    first = config.specialists[0].model_copy(update={"adapter": str(adapter)})
    config = config.model_copy(update={"specialists": (first, *config.specialists[1:])})
    with pytest.raises(FusionError, match=r"specialists\.0\.adapter: not merged yet; materialize the fusion first"):
        UltraFuserForCausalLM.from_fusion(config)


def test_a_model_that_changes_its_logits_at_the_end_is_refused(tiny_copy):
    granite = {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "logits_scaling": 8.0}
    path = tiny_copy.parent / "code" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **granite}))
    with pytest.raises(FusionError, match=r"specialists\.1\.model: logits_scaling changes the logits"):
        UltraFuserForCausalLM.from_fusion(load_fusion(tiny_copy))


def test_a_single_specialist_is_that_specialist(tmp_path):
    path = write_tiny_fusion(tmp_path, names=("text",), gate="none")
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    ids, mask = left_pad([[5, 6, 7], [8]], torch.device("cpu"))
    with torch.no_grad():
        fused, weights = model.next_token([ids], [mask])
        alone = LlamaForCausalLM.from_pretrained(path.parent / "text")(torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert torch.equal(weights, torch.ones(1, 2))
    torch.testing.assert_close(fused[0], alone, atol=1e-5, rtol=0)
