"""`ultrafuser analyze`: its files say what the reference says, and its mistakes are one line."""

import json
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.fakes import write_tiny_fusion
from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.analysis.runs import read_runs
from ultrafuser.gating.data.batches import collate_rows
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.training.command import run as train
from ultrafuser.gating.training.inputs import gather_inputs
from ultrafuser.gating.training.settings import TrainSettings
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main

NAMES = ("text", "code", "math")
ODD = "<script>alert(1)</script> &amp; \U0001f468\u200d\U0001f469 中文\n\n\tcaf\u00e9 $x_1$"
FILES = [
    "curves.png", "entropy.png", "heatmap.png", "provenance.json", "tokens.html", "tokens.png", "weights.json",
    "weights.md",
]  # fmt: skip


def write_data(folder: Path) -> list[str]:
    """The examples as a file for each domain; code has one more conversation, with odd text in two turns."""
    rows = [json.loads(line) for line in CONVERSATIONS.read_text().splitlines()]
    turn = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": ODD}]
    rows.append({"domain": "code", "messages": turn * 2})
    for name in NAMES:
        lines = [json.dumps(row) for row in rows if row["domain"] == name]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return [f"{name}={folder / name}.jsonl" for name in NAMES]


@pytest.fixture(scope="module")
def analysed(tiny_path, train_cache, tmp_path_factory):
    """Everything at once: a gate on all conversations, all of them shown, and the curves of a real run."""
    folder = tmp_path_factory.mktemp("analysed")
    data = write_data(folder)
    common = ["--cache", str(train_cache), "--precision", "float32"]
    out = folder / "run"
    argv = [str(tiny_path), "--stage", "1", "--data", str(CONVERSATIONS), "--eval-data", str(CONVERSATIONS)]
    argv += ["--steps", "3", "--rows-per-domain", "2", "--eval-every", "1", "--log-every", "1", "--cache-states"]
    assert train([*argv, "--output", str(out), *common]) == 0
    (folder / "output").mkdir()
    (folder / "output" / "weights.md").write_text("old")
    argv = [str(tiny_path), "--data", *data, "--run", str(out), "--output", str(folder / "output"), "--samples", "99"]
    assert main(["analyze", *argv, *common]) == 0
    settings = TrainSettings(fusion=str(tiny_path), data=tuple(data), output="none", stage=1, cache=str(train_cache))
    return SimpleNamespace(folder=folder / "output", run=out, tokens=_reference(tiny_path, settings))


@dataclass(frozen=True)
class Wanted:
    """What the reference says of one conversation's R response tokens."""

    ids: list[int]
    weights_SR: np.ndarray
    losses_R: np.ndarray


def _reference(path: Path, settings: TrainSettings) -> dict[str, list[Wanted]]:
    """Of each domain's conversations."""
    rows = gather_inputs(settings).rows
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    found: dict[str, list[Wanted]] = {}
    for domain in NAMES:
        batch = collate_rows([rows.dataset[index] for index in rows.indices(domain)])
        batch.pop("labels")
        with torch.no_grad():
            output = model(**batch)
        assert output.labels is not None
        assert output.logits is not None
        assert output.gate_weights is not None
        found[domain] = []
        for row, labels_R in enumerate(output.labels):
            mask = labels_R != -100
            losses_R = torch.nn.functional.cross_entropy(output.logits[row][mask], labels_R[mask], reduction="none")
            weights_SR = output.gate_weights[:, row][:, mask].double().numpy()
            found[domain].append(Wanted(labels_R[mask].tolist(), weights_SR, losses_R.numpy()))
    return found


def test_weights_leads_and_entropy_are_the_references(analysed):
    domains = json.loads((analysed.folder / "weights.json").read_text())["domains"]
    assert set(domains) == set(NAMES)
    for domain, own in domains.items():
        weights_SN = np.concatenate([wanted.weights_SR for wanted in analysed.tokens[domain]], axis=1)
        entropy_N = -(weights_SN * np.log(weights_SN)).sum(axis=0)
        assert own["conversations"] == (11 if domain == "code" else 10)
        assert own["tokens"] == weights_SN.shape[1]
        for index, name in enumerate(NAMES):
            assert own["weights"][name]["mean"] == pytest.approx(weights_SN[index].mean(), abs=1e-5)
            assert own["leads"][name]["mean"] == pytest.approx((weights_SN.argmax(axis=0) == index).mean(), abs=1e-5)
            assert own["weights"][name]["low"] < own["weights"][name]["mean"] < own["weights"][name]["high"]
        assert own["entropy_nats"]["mean"] == pytest.approx(entropy_N.mean(), abs=1e-5)
        assert own["effective_specialists"]["mean"] == pytest.approx(np.exp(entropy_N.mean()), abs=1e-4)


class Tokens(HTMLParser):
    """(text, title) of every token, by conversation."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.conversations: dict[tuple[str, str], list[list[str]]] = {}
        self.tags: set[str] = set()
        self._tokens: list[list[str]] = []
        self._is_token = False
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        own = dict(attrs)
        self.tags.add(tag)
        if tag == "section":
            self._tokens = self.conversations.setdefault((str(own["data-domain"]), str(own["data-number"])), [])
        elif tag == "span" and "title" in own:
            self._is_token = True
            self._tokens.append(["", str(own["title"])])

    def handle_endtag(self, tag):
        self._is_token = self._is_token and tag != "span"

    def handle_data(self, data):
        if self._is_token:
            self._tokens[-1][0] += data


def test_the_page_has_every_response_token_in_order_with_the_references_weights(analysed, tiny_path):
    page = Tokens((analysed.folder / "tokens.html").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_path.parent / "text")
    assert "script" not in page.tags
    assert len(page.conversations) == 31
    for (domain, number), tokens in page.conversations.items():
        wanted = analysed.tokens[domain][int(number) - 1]
        assert len(tokens) == len(wanted.ids)
        assert "".join(text for text, _ in tokens) == tokenizer.decode(wanted.ids)
        for (_, title), weights, loss in zip(tokens, wanted.weights_SR.T, wanted.losses_R, strict=True):
            told = dict(line.split()[:2] for line in title.splitlines() if not line.startswith("("))
            # Three digits are told.
            assert [float(told[name]) for name in NAMES] == pytest.approx(weights, abs=6e-4)
            assert float(told["loss"]) == pytest.approx(loss, abs=6e-4)
            assert float(told["entropy"]) == pytest.approx(-(weights * np.log(weights)).sum(), abs=6e-4)
    odd = "".join(text for text, _ in page.conversations["code", "11"])
    assert odd == f"{ODD}<|im_end|>" * 2


def test_pictures_are_written_and_curves_are_the_runs(analysed):
    assert sorted(path.name for path in analysed.folder.iterdir()) == FILES
    for name in FILES:
        if name.endswith(".png"):
            content = (analysed.folder / name).read_bytes()
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
            width, height = struct.unpack(">II", content[16:24])
            assert 900 < width < 2000
            assert 300 < height < 20_000
    (run,) = read_runs([str(analysed.run)])
    history = json.loads((analysed.run / "manifest.json").read_text())["history"]
    assert run.loss.values == [entry["loss"] for entry in history if "loss" in entry]
    assert run.loss.steps == [1, 2, 3]
    assert set(run.domains) == set(NAMES)
    assert all(set(own) == set(NAMES) for own in run.gate.values())
    for position in range(len(run.eval_loss.steps)):
        sums = [sum(series.values[position] for series in own.values()) for own in run.gate.values()]
        assert sums == pytest.approx([1] * 3, abs=1e-4)


def test_the_table_replaces_an_older_one_and_provenance_lies_beside_it(analysed):
    assert (analysed.folder / "weights.md").read_text().startswith("# Gate weights of tiny\n")
    provenance = json.loads((analysed.folder / "provenance.json").read_text())
    assert provenance["settings"]["samples"] == 99
    assert set(provenance["data_sha256"]) == {f"{name}.jsonl" for name in NAMES}
    assert [item["name"] for item in provenance["models"]] == list(NAMES)


def test_runs_alone_need_no_fusion(analysed, tmp_path, capsys):
    argv = ["analyze", "--run", str(analysed.run), str(analysed.run), "--output", str(tmp_path / "new" / "folder")]
    assert main(argv) == 0
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["curves.png"]
    assert capsys.readouterr().err == f"written: {tmp_path}/new/folder/curves.png\n"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "--run: nothing to analyze; name a FUSION with --data"),
        (["FUSION"], "--data: a gate is shown on conversations; add --data DOMAIN=FILE"),
        (["--data", "DATA"], "--data: which fusion reads it? Name a fusion file, folder or preset first"),
        (["FUSION", "--data", "none.jsonl"], "none.jsonl: no such data file"),
        (["none.yaml", "--data", "DATA"], "none.yaml: no such fusion file"),
        (["--run", "FOLDER"], "has no run of `ultrafuser train`; name its --output folder"),
        (["FUSION", "--data", "DATA", "--samples", "0"], "--samples: Input should be greater than or equal to 1"),
        (["FUSION", "--data", "DATA", "--max-length", "9999"], "--max-length: 9999 is more than the fusion's 1024"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(argv, complaint, tiny_path, tmp_path, train_cache, capsys):
    given = {"FUSION": str(tiny_path), "DATA": str(CONVERSATIONS), "FOLDER": str(tmp_path)}
    own = [given.get(argument, argument) for argument in argv]
    assert _complaint(own, tmp_path / "out", train_cache, capsys).find(complaint) > 0


def test_a_fusion_of_one_specialist_has_no_gate_to_show(tmp_path, train_cache, capsys):
    path = write_tiny_fusion(tmp_path / "one", names=["text"], num_layers=[1], gate="none")
    said = _complaint([str(path), "--data", str(CONVERSATIONS)], tmp_path / "out", train_cache, capsys)
    assert said.endswith("has no gate to analyze; name a fusion of two or more specialists with a gate")


def test_an_output_that_is_a_file_is_refused_before_any_work(tiny_path, tmp_path, train_cache, capsys):
    (tmp_path / "out").write_text("")
    said = _complaint([str(tiny_path), "--data", str(CONVERSATIONS)], tmp_path / "out", train_cache, capsys)
    assert said.endswith("out: cannot be a folder (Not a directory); name another")


def test_without_matplotlib_the_extra_that_has_it_is_named(tiny_path, tmp_path, train_cache, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = _complaint([str(tiny_path), "--data", str(CONVERSATIONS)], tmp_path / "out", train_cache, capsys)
    assert said == "ultrafuser: matplotlib is not installed; install ultrafuser[eval]"


def _complaint(argv: Sequence[str], output: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is said."""
    capsys.readouterr()  # what was said while the test's files were written
    assert main(["analyze", *argv, "--output", str(output), "--cache", str(cache)]) == EXIT_WRONG_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line
