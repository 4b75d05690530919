"""Progress where there is no terminal: lines for a log, and none that says nothing new."""

import pytest

from ultrafuser.gating.progress_bar import StepProgress, counting_bar


def test_a_step_is_a_line_when_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StepProgress()
    for label, share in [("merging", 0.0), ("merging", 0.5), ("encoding", 0.0)]:
        progress(label, share)
    progress.close()
    assert capsys.readouterr().err.splitlines() == ["merging", "encoding"]


def test_a_process_that_is_not_the_first_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StepProgress(is_shown=False)
    progress("merging", 0.0)
    progress.close()
    assert capsys.readouterr().err == ""


def test_a_count_is_a_line_with_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with counting_bar("responses", 1200, "call", done=200) as bar:
        bar.update()
    assert capsys.readouterr().err.splitlines() == ["responses: 1,000 of 1,200 calls to go"]
