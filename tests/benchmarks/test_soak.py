"""The soak's verdict: nothing lost, nothing grown; a result becomes a section of the page."""

from pathlib import Path

import pytest

from benchmarks.environment import describe_environment
from benchmarks.footprint import Footprint
from benchmarks.report import render_page
from benchmarks.soak import Soak, describe
from benchmarks.storm import Counts
from ultrafuser.gating.files import write_json

WARM = Footprint(
    num_requests=0, rss_bytes=100 << 20, num_fds=50, num_threads=20, kv_usage=0, num_running=0, num_waiting=0
)


def soak(last: Footprint, **counts: int) -> Soak:
    return Soak(
        date="2030-01-02",
        num_concurrent=64,
        leaving_share=0.2,
        counts=Counts(**{"completed": 80, "left": 20, **counts}),
        seconds=12.3,
        looks=(WARM, last),
        environment=describe_environment("benchmarks.soak", []),
    )


def test_a_server_that_holds_what_it_held_is_well() -> None:
    assert soak(WARM.model_copy(update={"num_requests": 100, "rss_bytes": 104 << 20})).is_ok


@pytest.mark.parametrize(
    "change",
    [
        {"rss_bytes": 106 << 20},
        {"num_fds": 51},
        {"num_threads": 21},
        {"kv_usage": 0.01},
        {"num_running": 1},
        {"num_waiting": 1},
    ],
    ids=str,
)
def test_whatever_stays_behind_is_a_leak(change: dict[str, float]) -> None:
    assert not soak(WARM.model_copy(update=change)).is_ok


@pytest.mark.parametrize("change", [{"lost": 1}, {"refused": 1}], ids=str)
def test_whatever_has_no_end_of_its_own_is_lost(change: dict[str, int]) -> None:
    assert not soak(WARM, **change).is_ok


def test_a_result_becomes_a_section_of_the_page(tmp_path: Path) -> None:
    result = soak(WARM.model_copy(update={"num_requests": 100, "num_fds": 55}), lost=3)
    write_json(tmp_path / "2030-01-02-soak.json", result.model_dump(mode="json"))
    page = render_page(tmp_path, tmp_path / "results.md")
    assert describe(result) in page
    assert "103 requests, 64 at once" in page
    assert "80 complete, 20 left by their client, 0 refused, **3 lost**" in page
    assert "| 100 | 100 | 55 | 20 | 0% | 0 | 0 |" in page
    assert "**not met**" in page
