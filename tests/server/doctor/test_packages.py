"""What is missing of a distribution that lies in a folder, written as `pip` writes it."""

from pathlib import Path

import pytest

from ultrafuser.server.doctor.finding import Finding
from ultrafuser.server.doctor.packages import engine_extra, missing_packages

WANTED = (
    "there>=1.0",
    "absent<3,>=2",
    "made-vllm==0.32.0; extra == 'cpu'",
    "elsewhere; sys_platform == 'win32'",
    "cluster; extra == 'ray'",
)


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed distributions, one of which is `made`."""
    install(tmp_path, "made", "0.1", WANTED)
    install(tmp_path, "there", "1.5")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(folder: Path, name: str, number: str, wanted: tuple[str, ...] = ()) -> None:
    place = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    place.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}", *(f"Requires-Dist: {w}" for w in wanted)]
    (place / "METADATA").write_text("\n".join(lines) + "\n")


def test_what_is_absent_is_told_with_its_command() -> None:
    assert missing_packages([], "made") == [Finding("absent is not installed", "pip install 'absent<3,>=2'")]


def test_an_extra_is_asked_for_by_its_name(site: Path) -> None:
    install(site, "absent", "2.1")
    found = missing_packages(["cpu", "ray"], "made")
    assert found == [
        Finding("made-vllm is not installed", "pip install 'made[cpu]'"),
        Finding("cluster is not installed", "pip install 'made[ray]'"),
    ]


def test_another_version_is_told(site: Path) -> None:
    install(site, "absent", "3.0")
    install(site, "made-vllm", "0.31.0")
    assert [finding.what for finding in missing_packages(["cpu"], "made")] == [
        "absent is 3.0, must be <3,>=2",
        "made-vllm is 0.31.0, must be ==0.32.0",
    ]


def test_a_local_build_counts_as_its_release(site: Path) -> None:
    install(site, "absent", "2.1")
    install(site, "made-vllm", "0.32.0+cpu")
    assert missing_packages(["cpu"], "made") == []


def test_nothing_is_known_of_what_is_not_installed() -> None:
    assert missing_packages(["cpu"], "never-heard-of") == []


def test_the_devices_choose_the_extra() -> None:
    assert engine_extra(has_gpu=False) == "cpu"


def test_this_environment_has_what_the_engine_needs() -> None:
    assert [finding for finding in missing_packages(["cpu"]) if "vllm" in finding.what] == []
