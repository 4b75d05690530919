"""Races of engines with drafts and without: the same answers, counted on both sides."""

import pytest

from benchmarks.engines import StepEngine, fused_engine
from benchmarks.speculation import NONE, Drafting, race_once
from benchmarks.workload import Request, random_requests
from tests.fakes import write_tiny_fusion
from ultrafuser.gating.model.fusion import FusionConfig, inspect_fusion, load_fusion
from ultrafuser.gating.model.schema import SpeculationSettings

NUM_TOKENS = 20


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> FusionConfig:
    return load_fusion(write_tiny_fusion(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def engines(fusion: FusionConfig) -> tuple[Drafting, StepEngine]:
    """With drafts and without; both stay to the end."""
    drafting = fused_engine(fusion, speculation=SpeculationSettings(max_tokens=4), max_step_seconds=0)
    return Drafting(drafting), fused_engine(fusion, max_step_seconds=0)


def test_a_race_has_the_same_answers_on_both_sides_and_counts_drafts(
    fusion: FusionConfig, engines: tuple[Drafting, StepEngine]
) -> None:
    drafting, without = engines
    requests = random_requests(inspect_fusion(fusion), [40, 23, 31], [NUM_TOKENS] * 3, seed=3)
    always = SpeculationSettings(drafter="leading", min_tokens=2, max_tokens=2)
    races = {
        name: race_once(drafting, name, settings, {"without": without}, requests)
        for name, settings in (("always", always), ("never", NONE))
    }
    for race in races.values():
        assert race["drafts"].answers == race["without"].answers
        assert race["drafts"].num_tokens == race["without"].num_rounds == 3 * (NUM_TOKENS - 1)
        assert race["without"].num_drafts == 0
        assert min(block.seconds for block in race.values()) > 0
    num_right = races["always"]["drafts"].num_tokens - races["always"]["drafts"].num_rounds
    assert 0 < num_right < races["always"]["drafts"].num_drafts
    assert (races["never"]["drafts"].num_drafts, races["never"]["drafts"].num_rounds) == (0, 3 * (NUM_TOKENS - 1))


def test_engines_that_are_measured_alone_race_against_nobody(
    fusion: FusionConfig, engines: tuple[Drafting, StepEngine]
) -> None:
    (request,) = random_requests(inspect_fusion(fusion), [8], [4], seed=1)
    race = race_once(None, "chosen", NONE, {"without": engines[1]}, [Request(request.prompts, 4)])
    assert list(race) == ["without"]
    assert [len(answer) for answer in race["without"].answers] == [4]
