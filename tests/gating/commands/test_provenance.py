"""Provenance: complete, of this repository's commit, and written whole or not at all."""

import json
import subprocess
from pathlib import Path

from ultrafuser.gating.commands.provenance import collect_provenance, git_state

ROOT = Path(__file__).parents[3]


def test_provenance_holds_settings_data_models_code_and_command():
    content = collect_provenance({"seed": 7}, {"a.jsonl": "ab"}, [{"name": "text"}])
    assert content["settings"] == {"seed": 7}
    assert content["data_sha256"] == {"a.jsonl": "ab"}
    assert content["models"] == [{"name": "text"}]
    assert {"python", "torch", "transformers", "datasets", "peft"} <= set(content["versions"])
    assert content["argv"]
    assert json.loads(json.dumps(content)) == content


def test_the_commit_is_that_of_the_code_and_a_change_shows(tmp_path):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) is None or not (tmp_path / ".git").exists()
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "First")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "is_modified": False}
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "is_modified": True}


def test_a_machine_without_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state(ROOT) is None
