"""Sliding windows: each layer sees its own model's window, and no specialist loses keys that it still needs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import families
from tests.server.engine.conftest import BUDGET_16, DRAFTS, PRESSURE
from tests.server.engine.harness import Arrival, InProcessEngine, Noisy, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.gating.model.fusion import load_fusion, save_fusion
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

MAX_TOKENS = 20
LENGTHS = [(13, 16, 36), (100, 20, 7), (5, 90, 33), (40, 3, 110), (64, 64, 64)]
"""Own prompt lengths: windows are 12 to 24 tokens, so that prompts and responses leave them behind."""
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def three_windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two specialists whose layers slide in part, with windows of their own, and one whose layers all do.

    The first one also sees; its text part is served.
    """
    models = {"text": families.gemma3_with_vision(16), "code": families.olmo3(24), "math": families.mistral(12)}
    folder = tmp_path_factory.mktemp("windows")
    whole = load_fusion(families.write_fusion(folder, models))
    save_fusion(materialize(whole, folder / "cache", on_progress=lambda *_: None), folder / "prepared.yaml")
    return folder / "prepared.yaml"


@pytest.fixture(scope="module")
def judge(three_windows: Path) -> Judge:
    """Before any engine: vLLM runs OLMo by Transformers' class, which it changes to compile itself."""
    model = UltraFuserForCausalLM.from_fusion(load_fusion(three_windows))
    olmo: Any = model.specialists[1]
    olmo.base_model.do_not_compile = True
    return Judge(model)


@pytest.fixture(scope="module", params=[BUDGET_16, DRAFTS | PRESSURE], ids=["budget-16", "drafts-pressure"])
def engine(three_windows: Path, judge: Judge, request: pytest.FixtureRequest) -> Iterator[InProcessEngine]:
    """Prompts beyond the windows are read in chunks below them; or at once, with drafts and too few blocks for all."""
    with InProcessEngine(three_windows, **request.param) as engine:
        if engine.runner.speculation is not None:
            engine.drafter = Noisy(engine.drafter)
        yield engine


@pytest.mark.parametrize("steps_apart", [0, 2])
def test_windows_of_three_sizes_equal_the_reference(engine: InProcessEngine, judge: Judge, steps_apart: int) -> None:
    arrivals = [Arrival(prompts, greedy(MAX_TOKENS), step=i * steps_apart) for i, prompts in enumerate(BATCH)]
    assert engine.tokens(arrivals) == [judge.tokens(prompts, MAX_TOKENS) for prompts in BATCH]


def test_a_cached_prefix_beyond_the_windows_is_found_and_exact(engine: InProcessEngine, judge: Judge) -> None:
    shared = random_prompts((70, 70, 70), seed=50)
    others = [random_prompts((20, 9, 33), seed=51 + index) for index in range(2)]
    prompts = [[own + rest for own, rest in zip(shared, other, strict=True)] for other in others]
    tokens = [engine.generate([Arrival(own, greedy(MAX_TOKENS))])[0] for own in prompts]
    assert [output.num_cached_tokens for output in tokens] == [0, 64]
    assert [list(output.outputs[0].token_ids) for output in tokens] == [
        judge.tokens(own, MAX_TOKENS) for own in prompts
    ]


def test_every_layer_is_planned_alike_and_slides_by_its_own_window(engine: InProcessEngine) -> None:
    windows = []
    for runner in engine.runner.runners:
        (group,) = runner.kv_cache_config.kv_cache_groups
        assert type(group.kv_cache_spec).__name__ == "FullAttentionSpec"
        assert group.kv_cache_spec.sliding_window is None
        layers = runner.compilation_config.static_forward_context
        windows.append([layers[name].sliding_window for name in group.layer_names])
        builders = [part.get_metadata_builder().window_size for part in runner.attn_groups[0]]
        assert sorted(builders) == sorted({window or -1 for window in windows[-1]})
    assert windows == [[16, 16, None], [24, None, 24], [12, 12]]


PAIRS = [
    {"text": families.mistral(12), "code": families.mistral(20)},
    {"text": families.mistral(12), "code": families.llama()},
    {"text": families.llama(), "code": families.mistral(12)},
]
IDS = ["only-sliding", "sliding-leader", "sliding-follower"]


@pytest.mark.parametrize("models", PAIRS, ids=IDS)
def test_a_window_of_the_whole_model_stays_its_own(tmp_path: Path, models: dict[str, Any]) -> None:
    """It stands in a configuration that all specialists share: the leader's was everybody's, or nobody's."""
    path = families.write_fusion(tmp_path, models, seed=1)
    judge = Judge(UltraFuserForCausalLM.from_fusion(load_fusion(path)))
    batch = [prompts[:2] for prompts in BATCH]
    with InProcessEngine(path) as engine:
        tokens = engine.tokens([Arrival(prompts, greedy(MAX_TOKENS)) for prompts in batch])
    assert tokens == [judge.tokens(prompts, MAX_TOKENS) for prompts in batch]
