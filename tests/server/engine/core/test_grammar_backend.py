"""What a constraint does is the same whatever was asked before, and white space in JSON comes to an end."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from tests.fakes import EOS_ID
from tests.server.engine.harness import Arrival, InProcessEngine, random_prompts
from ultrafuser.server.engine.core.grammar_backend import GrammarBackend, use_one_backend

PROMPTS = random_prompts([20, 17, 12], seed=3)
TABLE: list[dict[str, Any]] = [
    {"json": {"type": "string", "maxLength": 3}},
    {"json": {"type": "array", "uniqueItems": True}},
    {"regex": "(?=a)b"},
    {"json": {"type": "integer", "multipleOf": 3, "minimum": 1}},
    {"json": {"type": "string", "pattern": "^[a-c]{2}$", "maxLength": 2}},
    {"json": {"not": {"minimum": 3}}},
    {"json": {"allOf": [{"type": "integer"}, {"enum": [1, 2, "x"]}]}},
    {"json": {"$ref": "#"}},
    {"regex": "[ab]{2,4}"},
    {"regex": "\\p{L}"},
    {"choice": ["red", "blue"]},
    {"grammar": 'root ::= "x" ("y" | "z")'},
    {"grammar": "root ::= root"},
    {"grammar": 'start: "a" | "b"'},
    {"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
    {"json": {"type": "object", "patternProperties": {"a": {"type": "null"}, "b": {}}}},
    {"structural_tag": json.dumps({"type": "structural_tag", "format": {"type": "regex", "pattern": "a|b"}})},
    {"structural_tag": json.dumps({"type": "structural_tag", "format": {"type": "regex", "pattern": "(?=a)"}})},
]


def verdict(engine: InProcessEngine, constraint: dict[str, Any]) -> str:
    """The response, or why there is none."""
    params = SamplingParams(temperature=0.0, max_tokens=40, structured_outputs=StructuredOutputsParams(**constraint))
    params.logit_bias = {EOS_ID: 20.0}
    try:
        (output,) = engine.generate([Arrival(PROMPTS, params)])
    except VLLMValidationError as error:
        return f"refused: {error}"
    assert output.outputs[0].finish_reason in ("stop", "length")
    return str(output.outputs[0].text)


def test_a_constraint_does_the_same_whatever_was_asked_before(engine: InProcessEngine) -> None:
    manager = engine.scheduler.structured_output_manager
    verdicts = []
    for order in (TABLE, TABLE[::-1]):
        use_one_backend(manager, engine.llm.vllm_config)  # as in a fresh engine
        verdicts.append({json.dumps(constraint): verdict(engine, constraint) for constraint in order})
        assert isinstance(manager.backend, GrammarBackend)
    assert verdicts[0] == verdicts[1]
    assert sum(text.startswith("refused: ") for text in verdicts[0].values()) == 9


def test_an_engine_has_its_backend_before_the_first_constraint(engine_of: Callable[[str], InProcessEngine]) -> None:
    backend = engine_of("sync").scheduler.structured_output_manager.backend
    assert type(backend) is GrammarBackend
    assert issubclass(GrammarBackend, XgrammarBackend)


@pytest.mark.parametrize("form", [{"json_object": True}, {"json": {"type": "object"}}], ids=["json_object", "json"])
def test_a_model_that_would_write_blank_lines_for_ever_does_not(engine: InProcessEngine, form: dict[str, Any]) -> None:
    newline = engine.llm.get_tokenizer().encode("\n", add_special_tokens=False)[0]
    params = SamplingParams(
        temperature=0.0, max_tokens=40, logit_bias={newline: 100.0}, structured_outputs=StructuredOutputsParams(**form)
    )
    (output,) = engine.generate([Arrival(PROMPTS, params)])
    assert "\n\n\n" not in output.outputs[0].text
    assert output.outputs[0].text.strip() != "{"
