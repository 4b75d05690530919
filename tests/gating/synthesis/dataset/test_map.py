"""The map puts alike what a specialist reads alike."""

import json

import numpy as np
import pytest

from tests.gating.synthesis.model import serving_model
from tests.gating.synthesis.runs import run, settings_of
from ultrafuser.gating.synthesis.dataset.export import export
from ultrafuser.gating.synthesis.dataset.map import draw_map, to_plane
from ultrafuser.gating.synthesis.settings import ExportSettings, MapSettings


def test_groups_that_lie_apart_stay_apart():
    source = np.random.default_rng(0)
    centres = source.normal(size=(3, 32))
    means = np.concatenate([centre + 0.1 * source.normal(size=(30, 32)) for centre in centres]).astype(np.float32)
    points = to_plane(means, seed=0).reshape(3, 30, 2)
    middles = points.mean(axis=1)
    radius = max(np.linalg.norm(points - middles[:, None], axis=2).max(axis=1))
    distances = [np.linalg.norm(middles[one] - middles[other]) for one, other in ((0, 1), (0, 2), (1, 2))]
    assert min(distances) > radius


def test_every_conversation_is_a_point_of_its_domain(tmp_path, tiny_path, train_cache):
    with serving_model() as endpoint:
        run(settings_of(tmp_path, endpoint))
    export(ExportSettings(output=str(tmp_path)))
    settings = MapSettings(
        output=str(tmp_path), fusion=str(tiny_path), specialist="code", limit=10, max_length=600, cache=str(train_cache)
    )
    picture = draw_map(settings)
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(picture.with_suffix(".json").read_text())
    assert found["specialist"] == "code"
    assert {domain: len(points) for domain, points in found["points"].items()} == {"text": 10, "code": 10}
    again = draw_map(settings)
    assert json.loads(again.with_suffix(".json").read_text()) == found
    with pytest.raises(ValueError, match="--specialist: 'law' is none of text, code, math"):
        draw_map(settings.model_copy(update={"specialist": "law"}))
