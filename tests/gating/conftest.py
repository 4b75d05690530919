"""Tiny fused models, written once per test run; tests that break one work on a copy."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gating.fusion import load_fusion
from gating.modeling import UltraFuserForCausalLM
from tests.fakes import write_tiny_fusion


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more by waking a second thread than they win, ten times over on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fusion.yaml of three specialists of equal width and different depth and vocabulary."""
    return write_tiny_fusion(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_copy(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(tiny_path.parent, tmp_path / "copy")
    return tmp_path / "copy" / "fusion.yaml"


@pytest.fixture(scope="session")
def tiny_model(tiny_path: Path) -> UltraFuserForCausalLM:
    """The reference of `tiny_path`; read only."""
    return UltraFuserForCausalLM.from_fusion(load_fusion(tiny_path))
