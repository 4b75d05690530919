"""Where a result comes from: settings, code, libraries, data and command, as one JSON file beside the result.

Knows the interpreter, git and files. Does not know what was trained, and reads no environment.
"""

import datetime
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

PROVENANCE_FILE = "provenance.json"
_LIBRARIES = ("accelerate", "datasets", "peft", "safetensors", "tokenizers", "torch", "transformers", "ultrafuser")


def collect_provenance(settings: Mapping[str, Any], data: Mapping[str, str], models: object) -> dict[str, Any]:
    """Everything needed to say what made a result, as JSON values.

    Args:
        settings: the whole configuration of the run, seed included.
        data: SHA-256 of every data file, by name.
        models: what identifies the models it started from.
    """
    return {
        "settings": dict(settings),
        "data_sha256": dict(data),
        "models": models,
        "git": git_state(Path(__file__).parent),
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "argv": sys.argv,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the code and whether files differ from it; None where there is no git or no repository."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "is_modified": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
