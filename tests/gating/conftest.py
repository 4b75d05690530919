"""Tiny fused models, written once per test run; tests that break one work on a copy. And short training runs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.draft_heads import write_random_head
from tests.fakes import write_tiny_fusion
from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.training.command import train
from ultrafuser.gating.training.settings import TrainSettings


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fusion.yaml of three specialists of equal width and different depth and vocabulary."""
    return write_tiny_fusion(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_copy(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(tiny_path.parent, tmp_path / "copy")
    return tmp_path / "copy" / "fusion.yaml"


@pytest.fixture
def with_head(tiny_copy: Path) -> Path:
    """fusion.yaml of a copy that drafts with a head beside it."""
    write_random_head(tiny_copy, tiny_copy.parent / "head")
    content = yaml.safe_load(tiny_copy.read_text())
    content["engine"]["speculation"] = {"drafter": "head", "path": "head", "max_tokens": 3}
    tiny_copy.write_text(yaml.safe_dump(content))
    return tiny_copy


@pytest.fixture(scope="session")
def tiny_model(tiny_path: Path) -> UltraFuserForCausalLM:
    """The reference of `tiny_path`; read only."""
    return UltraFuserForCausalLM.from_fusion(load_fusion(tiny_path))


@pytest.fixture(scope="session")
def train_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoded rows and hidden states of all training tests."""
    return tmp_path_factory.mktemp("train-cache")


@pytest.fixture
def settings_of(tiny_path: Path, tmp_path: Path, train_cache: Path) -> Callable[..., TrainSettings]:
    """Settings of a short run on the tiny fusion and the examples, with changes."""

    def make(**changes: Any) -> TrainSettings:
        options: dict[str, Any] = {
            "fusion": str(tiny_path),
            "data": [str(CONVERSATIONS)],
            "output": str(tmp_path / "out"),
            "cache": str(train_cache),
            "steps": 4,
            "rows_per_domain": 4,
            "learning_rate": 3e-3,
            "eval_every": 1000,
            "log_every": 1,
            "precision": "float32",
        }
        return TrainSettings(**(options | changes))

    return make


@pytest.fixture
def run(settings_of: Callable[..., TrainSettings]) -> Callable[..., Path]:
    """Trains by such settings; returns the new fusion's file."""

    def start(**changes: Any) -> Path:
        path = train(settings_of(**changes))
        assert path is not None
        return path

    return start
