"""Before the first request: profiling, warm-up and capture of n runners. Of what a GPU does, what a CPU can do too."""

from collections.abc import Iterator

import pytest
import torch
from vllm.v1.worker import workspace

from tests.server.engine.harness import Arrival, InProcessEngine, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.server.engine.worker.mixing import Mixer
from ultrafuser.server.engine.worker.warming import keeping_workspace


def test_profiling_mixes_the_largest_step_and_leaves_the_engine_exact(
    engine: InProcessEngine, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Followers hand out the leader's tokens; profiling samples before there are any, and the start failed."""
    mixed: list[tuple[int, int]] = []
    fuse = Mixer.fuse_into_leader

    def spy(mixer: Mixer, rows, *args):
        mixed.append((len(rows), len(rows[0].rows)))
        return fuse(mixer, rows, *args)

    monkeypatch.setattr(Mixer, "fuse_into_leader", spy)
    stand_ins = [follower.sampler for follower in engine.runner.followers]
    with torch.inference_mode():
        engine.runner.profile_run()
    rows_a_request = 1 + engine.runner.leader.num_spec_tokens
    assert mixed == [(3, rows_a_request * engine.runner.scheduler_config.max_num_seqs)]
    assert [follower.sampler for follower in engine.runner.followers] == stand_ins
    prompts = random_prompts((13, 16, 36), 0)
    assert engine.tokens([Arrival(prompts, greedy(8))]) == [judge.tokens(prompts, 8)]


def test_the_kernels_of_every_specialist_are_warmed_up(
    engine: InProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[int] = []
    for number, runner in enumerate(engine.runner.runners):
        monkeypatch.setattr(runner.jit_warmup_registry, "warmup", lambda number=number: warmed.append(number))
    engine.runner.jit_warmup_registry.warmup()
    assert warmed == [0, 1, 2]


@pytest.fixture
def scratch() -> Iterator[workspace.WorkspaceManager]:
    """vLLM's shared scratch memory, on the CPU, with 1000 bytes in use."""
    workspace.init_workspace_manager(torch.device("cpu"))
    manager = workspace.current_workspace_manager()
    manager.get_simultaneous(((1000,), torch.uint8))
    yield manager
    workspace.reset_workspace_manager()


def test_a_specialist_that_fits_the_shared_scratch_memory_may_be_captured(scratch: workspace.WorkspaceManager) -> None:
    with keeping_workspace("code"):
        scratch.get_simultaneous(((1000,), torch.uint8))


def test_one_that_would_move_it_under_the_others_graphs_is_refused_by_name(
    scratch: workspace.WorkspaceManager,
) -> None:
    with pytest.raises(ValueError, match=r"^specialists\.code\.model: .+name it first.+$"), keeping_workspace("code"):
        scratch.get_simultaneous(((100_000,), torch.uint8))


def test_without_shared_scratch_memory_there_is_nothing_to_watch() -> None:
    with keeping_workspace("code"):
        assert not workspace.is_workspace_manager_initialized()
