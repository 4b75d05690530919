"""Fixtures that more than one folder of tests uses."""

import ctypes
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.materialize import materialize

# Models this small lose more by waking a second thread than they win: fifty times over on a busy machine.
torch.set_num_threads(1)

if sys.platform == "linux":
    # Tensors of 1 MiB and more go back to the system when they are freed. By itself glibc raises this size
    # (M_MMAP_THRESHOLD, -3) with each block that is freed, to 32 MiB, and keeps what is smaller: gigabytes, in the end.
    ctypes.CDLL(None).mallopt(-3, 2**20)


class FolderScheduling(LoadScopeScheduling):
    """Gives a folder's tests to one process: they share servers and engines, which are slow to start."""

    def _split_scope(self, nodeid: str) -> str:
        return "/".join(PurePosixPath(nodeid.partition("::")[0]).parent.parts[:3])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FolderScheduling:
    """In the place of xdist's groups by mark: pytest 9.2 no longer lets xdist 3.8 put them into node ids."""
    return FolderScheduling(config, log)


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the demo's prepared models: dequantised once per test run, not in the user's home."""
    folder = tmp_path_factory.mktemp("model-cache")
    materialize(load_fusion("demo"), folder, on_progress=lambda step, share: None)
    return folder
