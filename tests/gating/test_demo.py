"""The shipped demo: what its manifest says is what is there, and it is small enough to be shipped."""

import json
from pathlib import Path

from ultrafuser.gating.files import file_digest
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.gate_file import load_gate
from ultrafuser.gating.model.packaged import DISTRIBUTION
from ultrafuser.gating.model.schema import FRESH_GATE

DEMO = Path(__file__).parents[2] / "gating" / "demo"
MANIFEST = json.loads((DEMO / "manifest.json").read_text())
MAX_BYTES = 32 * 2**20


def test_every_shipped_file_is_the_manifests() -> None:
    weights = [
        path for path in DEMO.rglob("*") if path.suffix == ".safetensors" or path.parent.parent.name == "adapters"
    ]
    assert {path.relative_to(DEMO).as_posix(): file_digest(path) for path in weights} == MANIFEST["files_sha256"]
    assert sum(path.stat().st_size for path in weights) < MAX_BYTES


def test_the_preset_serves_the_shipped_files() -> None:
    fusion = load_fusion("demo")
    for specialist in fusion.specialists:
        assert Path(specialist.adapter or "").resolve() == DEMO / "adapters" / specialist.name
    assert Path(fusion.gate or "").resolve() == DEMO / "gate.safetensors"


def test_the_gate_has_learned() -> None:
    fusion = load_fusion("demo")
    gates = (fusion.gate or "", FRESH_GATE)
    ours, theirs = (load_gate(gate, fusion.specialist_names, (576,) * 3).state_dict() for gate in gates)
    assert all(not ours[name].equal(theirs[name]) for name in ours)


def test_the_manifest_says_what_the_demo_was_made_from() -> None:
    assert MANIFEST["base"]["distribution"] == DISTRIBUTION
    runs = MANIFEST["runs"]
    assert list(runs) == ["specialist-text", "specialist-code", "specialist-math", "stage1", "stage2"]
    for run in runs.values():
        assert run["settings"]["steps"] > 0
        assert all(len(digest) == 64 for digest in run["data_sha256"].values())
        assert not run["git"]["is_modified"]
    trained_on = {name for run in runs.values() for name in run["data_sha256"] if name.startswith("train.")}
    assert trained_on == {f"train.{name}.jsonl.gz" for name in ("text", "code", "math")}


def test_the_manifest_names_no_folder_of_the_machine_it_was_made_on() -> None:
    texts = [MANIFEST, *(json.loads(path.read_text()) for path in DEMO.glob("adapters/*/adapter_config.json"))]
    for value in _strings(texts):
        assert not value.startswith(("/", "~")), value
        assert "/home/" not in value
        assert "/tmp/" not in value


def test_the_manifest_holds_the_claim_the_readme_makes() -> None:
    """Held-out loss: each specialist is the best of the three at home; the fusion beats all, and is near them there."""
    losses = MANIFEST["held_out"]["loss"]
    names = ("text", "code", "math")
    others = [row for row in losses if row != "fused"]
    for domain in names:
        best = min(losses[name][domain] for name in names)
        assert losses[domain][domain] == best
        assert losses["fused"][domain] <= 1.005 * best
        weights = MANIFEST["held_out"]["gate"][domain]
        assert max(weights, key=weights.get) == domain
    assert all(losses["fused"]["mean"] < losses[row]["mean"] for row in others)


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []
