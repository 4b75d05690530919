"""Fixtures that more than one folder of tests uses."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.materialize import materialize

# Models this small lose more by waking a second thread than they win: fifty times over on a busy machine.
torch.set_num_threads(1)

if sys.platform == "linux":
    # Tensors of 1 MiB and more go back to the system when they are freed. By itself glibc raises this size
    # (M_MMAP_THRESHOLD, -3) with each block that is freed, to 32 MiB, and keeps what is smaller: gigabytes, in the end.
    ctypes.CDLL(None).mallopt(-3, 2**20)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give each folder's tests to one process: they share servers and engines, which are slow to start."""
    folder = item.path.parent.relative_to(item.config.rootpath).parts[:3]
    item.add_marker(pytest.mark.xdist_group("/".join(folder)))


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the demo's prepared models: dequantised once per test run, not in the user's home."""
    folder = tmp_path_factory.mktemp("model-cache")
    materialize(load_fusion("demo"), folder, on_progress=lambda step, share: None)
    return folder
