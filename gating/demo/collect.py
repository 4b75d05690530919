"""Makes the shipped demo out of the recipe's results: adapters, gate, and a manifest of where they come from.

Run by recipe.sh: python collect.py OUTPUT, which writes OUTPUT/demo. Paths of the machine are left out of the manifest.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ultrafuser.gating.commands.run_folder import MANIFEST_FILE
from ultrafuser.gating.files import file_digest, write_json
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.packaged import DISTRIBUTION, PACKAGE, packaged_model

STAGES = ("stage1", "stage2")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LOSS_FILE = "loss.json"


def collect(output: Path) -> Path:
    """The demo's folder, written from the folders of the recipe's steps."""
    fusion = load_fusion(output / STAGES[-1])
    demo = output / "demo"
    shutil.rmtree(demo, ignore_errors=True)
    for specialist in fusion.specialists:
        assert specialist.adapter is not None
        folder = demo / "adapters" / specialist.name
        folder.mkdir(parents=True)
        for name in ADAPTER_FILES:
            shutil.copyfile(Path(specialist.adapter) / name, folder / name)
    assert fusion.gate is not None
    shutil.copyfile(fusion.gate, demo / "gate.safetensors")
    files = sorted(path for path in demo.rglob("*") if path.is_file())
    runs = [*(f"specialist-{name}" for name in fusion.specialist_names), *STAGES]
    content = {
        "base": {"distribution": DISTRIBUTION, **packaged_model(PACKAGE).parts},
        "files_sha256": {path.relative_to(demo).as_posix(): file_digest(path) for path in files},
        "runs": {name: _run(output / name / MANIFEST_FILE) for name in runs},
        "held_out": json.loads((output / LOSS_FILE).read_text(encoding="utf-8")),
    }
    write_json(demo / MANIFEST_FILE, content)
    return demo


def _run(path: Path) -> dict[str, Any]:
    """What a run's own manifest says, without its history and without the machine's paths."""
    own = json.loads(path.read_text(encoding="utf-8"))
    settings = {name: _plain(value) for name, value in own["settings"].items() if value is not None}
    kept = {name: own[name] for name in ("data_sha256", "versions", "git", "started", "metrics")}
    return {"settings": settings, **kept}


def _plain(value: Any) -> Any:
    """Settings without folders: file names say enough beside their hashes."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value


if __name__ == "__main__":
    print(collect(Path(sys.argv[1])))
