"""Blocks of two gates take turns on one batch, also where one of them looks back at a response."""

from pathlib import Path

from benchmarks.command import Options
from benchmarks.gate_kinds import KINDS, measure
from tests.fakes import write_tiny_fusion


def test_every_kind_is_compared_with_the_papers(tmp_path: Path) -> None:
    options = Options(fusion=str(write_tiny_fusion(tmp_path)), cache=tmp_path / "cache", quick=True)
    comparisons = measure(options)
    assert [own.case for own in comparisons] == [f"{kind}, batch {batch}" for kind in KINDS for batch in (1, 2)]
    assert all(own.ratio is not None and own.ratio > 0 for own in comparisons)
