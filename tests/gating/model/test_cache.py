"""The cache builds each artifact once, whole or not at all."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ultrafuser.gating.model.cache import Artifact, Tick, build_once, fingerprint


def artifact(build: Callable[[Path, Tick], None], **parts: object) -> Artifact:
    return Artifact(name="model", label="making model", parts=parts or {"content": 1}, build=build)


def write(folder: Path, tick: Tick) -> None:
    (folder / "weights").write_text("whole")


def ignore(step: str, share: float) -> None:
    pass


def test_an_artifact_is_built_once_and_found_again(tmp_path: Path) -> None:
    builds = []

    def build(folder: Path, tick: Tick) -> None:
        builds.append(folder)
        write(folder, tick)

    first = build_once(artifact(build), tmp_path / "cache", ignore)
    second = build_once(artifact(build), tmp_path / "cache", ignore)
    assert first == second
    assert (first / "weights").read_text() == "whole"
    assert len(builds) == 1


def test_equal_parts_name_one_folder_and_other_parts_another(tmp_path: Path) -> None:
    folders = {artifact(write, a=1, b=2).folder(tmp_path), artifact(write, b=2, a=1).folder(tmp_path)}
    assert len(folders) == 1
    assert artifact(write, a=1, b=3).folder(tmp_path) not in folders


@pytest.mark.parametrize("failure", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(tmp_path: Path, failure: BaseException) -> None:
    def fail(folder: Path, tick: Tick) -> None:
        write(folder, tick)
        raise failure

    with pytest.raises(type(failure)):
        build_once(artifact(fail), tmp_path, ignore)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert (build_once(artifact(write), tmp_path, ignore) / "weights").is_file()


def test_leftovers_of_a_killed_process_are_not_mistaken_for_content(tmp_path: Path) -> None:
    partial = Path(f"{artifact(write).folder(tmp_path)}.partial")
    partial.mkdir()
    (partial / "half").write_text("half")
    folder = build_once(artifact(write), tmp_path, ignore)
    assert [path.name for path in folder.iterdir()] == ["weights"]


def test_a_second_builder_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    started, waiting = threading.Event(), threading.Event()
    builds = []

    def build(folder: Path, tick: Tick) -> None:
        builds.append(folder)
        started.set()
        assert waiting.wait(30)
        write(folder, tick)

    def report(step: str, share: float) -> None:
        if "waiting" in step:
            waiting.set()

    first = threading.Thread(target=build_once, args=(artifact(build), tmp_path, ignore))
    first.start()
    assert started.wait(30)
    folder = build_once(artifact(build), tmp_path, report)
    first.join()
    assert (folder / "weights").read_text() == "whole"
    assert len(builds) == 1


def test_ticks_of_a_build_reach_the_report_under_its_label(tmp_path: Path) -> None:
    reported = []

    def build(folder: Path, tick: Tick) -> None:
        tick(0.5)

    build_once(artifact(build), tmp_path, lambda step, share: reported.append((step, share)))
    assert reported == [("making model", 0.0), ("making model", 0.5)]


def test_a_fingerprint_follows_content_and_names_not_times(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("one")
    before = fingerprint(tmp_path)
    file.write_text("one")
    assert fingerprint(tmp_path) == before
    file.write_text("two")
    assert fingerprint(tmp_path) != before
    file.write_text("one")
    file.rename(tmp_path / "renamed")
    assert fingerprint(tmp_path) != before
