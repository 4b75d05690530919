"""What a step costs on a GPU: shapes are those of the models, and the whole of it on a tiny one."""

import json
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from benchmarks.gpu_step import QUICK, SIZES, Sizes, StepOptions, copy_bandwidth, measure, most_tokens
from benchmarks.shapes import SHAPES, fusion_of_shape
from benchmarks.stepping import alternate
from tests.e2e.process import clean_environment
from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion
from ultrafuser.gating.model.loading import empty_model


@pytest.mark.parametrize(("shape", "billions"), [("SmolLM2-135M", 0.1345), ("Qwen2.5-7B", 7.616)])
def test_shapes_have_as_many_parameters_as_the_models(shape: str, billions: float) -> None:
    with fusion_of_shape(shape, {"max_model_len": 512}) as path:
        fusion = load_fusion(path)
        info = inspect_fusion(fusion)
        assert SHAPES[shape].num_tokens <= info.num_shared_ids <= SHAPES[shape].config.vocab_size
        assert info.max_model_len == 512
        assert empty_model(fusion.specialists[0]).num_parameters() / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("sizes", [*SIZES, QUICK], ids=lambda sizes: sizes.shape)
def test_responses_last_for_all_steps_if_every_draft_holds(sizes: Sizes) -> None:
    """They ended in the last block, whose steps then had nothing to do."""
    engine = Mock()
    alternate(engine, None, [], sizes.num_rounds, sizes.num_steps)
    assert 1 + 5 * engine.step.call_count < most_tokens(sizes)
    assert sizes.prompt_length + most_tokens(sizes) <= 4 * sizes.prompt_length + sizes.long_prompt


def test_a_copy_is_measured() -> None:
    assert copy_bandwidth() > 1e8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_run() -> None:
    with pytest.raises(SystemExit, match="no GPU answers; --quick runs a tiny model that needs none"):
        list(measure(StepOptions()))


@pytest.mark.long
def test_every_part_of_a_tiny_step_is_measured() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_step", "--quick"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    ratios = json.loads(done.stdout)["ratios"]
    assert ratios["tiny_step_batch_1_against_3_single"] > 0
    assert 0 < ratios["tiny_gate_mixing_and_marks_batch_2_of_the_step"] < 1
    assert ratios["tiny_step_batch_1_against_its_floor"] > 1
    assert ratios["tiny_first_token_of_40_against_3_single"] > 0
    assert ratios["tiny_round_of_4_drafts_batch_1_against_3_single_steps"] > 0
