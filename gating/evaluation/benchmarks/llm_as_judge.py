"""MT-Bench and AlpacaEval (both 2023): answers written in the form their judges' own programs read; no score here."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultrafuser.gating.evaluation.benchmarks.items import Answered, Benchmark, HubSource, Item, Request, Row
from ultrafuser.gating.files import write_json, write_json_lines

_ALPACA_PROMPT = (
    "Please give helpful, very detailed, and polite answer to the user's question below. Question: {instruction}"
)

# What FastChat itself writes where a model's service failed.
_FAILED_TURN = "$ERROR$"


def _read_mt_bench(row: Row, chain_of_thought: bool) -> Item:
    id = row.identity("question_id")
    return Item(id, (Request(id, row.texts("turns")),), {"question_id": row.content["question_id"]})


def _write_mt_bench(folder: Path, model: str, answered: Answered) -> Path:
    """FastChat's `model_answer/MODEL.jsonl`: one line a question."""
    path = folder / "model_answer.jsonl"
    rows = []
    for item, (answer,) in answered:
        missing = len(item.requests[0].turns) - len(answer.texts)
        content = {
            "question_id": item.reference["question_id"],
            "answer_id": uuid.uuid5(uuid.NAMESPACE_URL, f"{model}/{item.id}/{answer.time}").hex,
            "model_id": model,
            "choices": [{"index": 0, "turns": [*answer.texts, *[_FAILED_TURN] * missing]}],
            "tstamp": answer.time,
        }
        rows.append(content)
    write_json_lines(path, rows)
    return path


def _read_alpaca_eval(row: Row, chain_of_thought: bool) -> Item:
    instruction, id = row.text("instruction"), str(row.number)
    reference = {"instruction": instruction, "dataset": row.text("dataset")}
    return Item.asked_once(id, _ALPACA_PROMPT.format(instruction=instruction), reference)


def _write_alpaca_eval(folder: Path, model: str, answered: Answered) -> Path:
    """AlpacaEval's `model_outputs`: one JSON list. A failed request has an empty output."""
    path = folder / "model_outputs.json"
    content = [
        {
            "instruction": item.reference["instruction"],
            "output": answer.texts[-1] if answer.texts else "",
            "generator": model,
            "dataset": item.reference["dataset"],
        }
        for item, (answer,) in answered
    ]
    write_json(path, content)
    return path


def _convert_mt_bench(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"question_id": row["question_id"], "turns": row["prompt"]}


MT_BENCH = Benchmark(
    name="mt_bench",
    prompts=(),
    # The dataset's own rows have other ids than those that FastChat's judge looks for; this file has them.
    hub=HubSource(
        "HuggingFaceH4/mt_bench_prompts", "train", data_files="raw/question.jsonl", convert=_convert_mt_bench
    ),
    read=_read_mt_bench,
    export=_write_mt_bench,
)

ALPACA_EVAL = Benchmark(
    name="alpaca_eval",
    prompts=(_ALPACA_PROMPT,),
    hub=HubSource("tatsu-lab/alpaca_eval", "eval", data_files="alpaca_eval.json"),
    read=_read_alpaca_eval,
    export=_write_alpaca_eval,
)
