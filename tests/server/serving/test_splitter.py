"""Where the text of a thought ends, however an answer is cut into deltas; and whose markers can be told apart."""

import random
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.fakes import build_tokenizer
from tests.server.serving.test_thoughts import CALL, LEAVES, MARKERS, OPENS, SCRIPT, written
from ultrafuser.gating.model.fusion import inspect_fusion
from ultrafuser.server.engine.shared.options import engine_arguments
from ultrafuser.server.engine.shared.thought import Opening, ThoughtReader
from ultrafuser.server.serving.rendering import FusedRenderer
from ultrafuser.server.serving.thinking import Markers, ThinkingError, markers_of
from ultrafuser.server.serving.thoughts import Splitter


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of all specialists."""
    return build_tokenizer(320, 320, "text", MARKERS)


@pytest.fixture(scope="module")
def markers(tokenizer: Any) -> Markers:
    """Those of Qwen's models."""
    return markers_of("qwen3", tokenizer, 320)


ANSWERS: list[tuple[Opening, str]] = [
    ("open", SCRIPT),
    ("open", f"<think>{SCRIPT}"),
    ("open", "</think>At once."),
    ("open", "No end"),
    ("open", "Ends here</think>"),
    ("open", f"Hm.{CALL}"),
    ("open", "a < b </ c </thin k></think>x </think> y"),
    ("unopened", f"<think>{SCRIPT}"),
    ("unopened", "It is <think>no</think>"),
    ("unopened", "<think>"),
    ("closed", "It </think> is."),
    ("open", ""),
]


@pytest.mark.parametrize(("opening", "text"), ANSWERS)
@pytest.mark.parametrize("seed", range(8))
def test_the_split_does_not_depend_on_the_cut(
    tokenizer: Any, markers: Markers, opening: Opening, text: str, seed: int
) -> None:
    """Text that comes later than its tokens, as where a stop string may begin, included."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    thought = markers.thought(opening, None)
    whole = Splitter(thought, markers, tokenizer.decode).take(text, token_ids, is_last=True)
    draw = random.Random(seed)
    splitter = Splitter(thought, markers, tokenizer.decode)
    told, rest, num_ids, num_chars = "", "", 0, 0
    behind: list[int] = []
    while num_ids < len(token_ids) or num_chars < len(text):
        ids = token_ids[num_ids : num_ids + draw.randint(0, 3)]
        num_ids += len(ids)
        room = len(tokenizer.decode(token_ids[:num_ids])) - num_chars
        piece = text[num_chars : num_chars + draw.randint(0, room)] if num_ids < len(token_ids) else text[num_chars:]
        num_chars += len(piece)
        is_last = num_ids == len(token_ids) and num_chars == len(text)
        parts = splitter.take(piece, ids, is_last=is_last)
        told, rest, behind = told + parts[0], rest + parts[1], behind + parts[2]
    assert (told, rest, behind) == whole or not text
    reader = ThoughtReader(thought)
    assert behind == [token_id for token_id in token_ids if not reader.read(token_id)]


def test_a_marker_that_is_spelled_with_other_tokens_ends_nothing(tokenizer: Any, markers: Markers) -> None:
    spelled = [token for char in "a</think>b" for token in tokenizer.encode(char, add_special_tokens=False)]
    token_ids = [*spelled, markers.end_id, *tokenizer.encode("c", add_special_tokens=False)]
    splitter = Splitter(markers.thought("open", None), markers, tokenizer.decode)
    assert splitter.take("a</think>b</think>c", token_ids, is_last=True)[:2] == ("a</think>b", "c")


def test_specialists_that_disagree_are_refused_by_name(tmp_path: Path) -> None:
    own = written(tmp_path, OPENS, LEAVES, OPENS)
    own_info = inspect_fusion(own)
    config = AsyncEngineArgs(**engine_arguments(own, own_info)).create_engine_config()
    FusedRenderer(config, own, own_info).shutdown()
    with pytest.raises(ThinkingError, match="prompt of specialist text opens a thought, that of code does not"):
        FusedRenderer(config, own, own_info, "qwen3")


@pytest.mark.parametrize(
    ("name", "message"),
    [("qwen4", "vLLM has no parser 'qwen4'"), ("seed_oss", "seed_oss"), ("granite", "no markers around a thought")],
)
def test_a_parser_that_does_not_fit_is_refused_by_name(tokenizer: Any, name: str, message: str) -> None:
    with pytest.raises(ThinkingError, match=message):
        markers_of(name, tokenizer, 320)


def test_markers_must_be_shared(tokenizer: Any) -> None:
    with pytest.raises(ThinkingError, match="is not a token that all specialists share"):
        markers_of("qwen3", tokenizer, tokenizer.get_vocab()["</think>"])
