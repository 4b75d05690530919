"""Chat templates: the shipped forms, and the rule for what a template cannot express."""

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.fakes import build_tokenizer
from ultrafuser.gating.templates import TemplateError, fold_messages, load_template, template_names
from ultrafuser.gating.templates.probe import Capabilities, capabilities

USER = {"role": "user", "content": "Add 2 and 3."}
REPLY = {"role": "assistant", "content": "It is 5."}
AGAIN = {"role": "user", "content": "Thanks!"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "five"}

# Speaks of everything: system messages anywhere, tools, calls and results.
FULL_TEMPLATE = (
    "{% for tool in tools or [] %}[tool {{ tool | tojson }}]{% endfor %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "[call {{ call.function.name }} {{ call.function.arguments | tojson }}]"
    "{% endfor %}{% endfor %}"
)
# As `FULL_TEMPLATE`, but an argument at a time: it fails on arguments that are no object.
ITEMS_TEMPLATE = FULL_TEMPLATE.replace(
    "{{ call.function.arguments | tojson }}",
    "{% for key, value in call.function.arguments | items %}{{ key }}={{ value | tojson }}{% endfor %}",
)
# Insists on a call before its results, and on user and assistant in turn elsewhere.
STRICT_TOOLS_TEMPLATE = (
    "{% set ns = namespace(turn=0, called=false) %}{% for message in messages %}"
    "{% if message.role == 'tool' %}{% if not ns.called %}{{ raise_exception('no call') }}{% endif %}"
    "{% elif not message.tool_calls %}"
    "{% if (message.role == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% set ns.turn = ns.turn + 1 %}"
    "{% endif %}{% set ns.called = message.tool_calls or message.role == 'tool' %}{% endfor %}"
) + FULL_TEMPLATE
TEMPLATES_WITH_TOOLS = (FULL_TEMPLATE, ITEMS_TEMPLATE, STRICT_TOOLS_TEMPLATE)
# Insists on user and assistant in turn, as many published templates do.
STRICT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}"
    "{% endfor %}"
)
# Shows a system message only at the start.
LEADING_SYSTEM_TEMPLATE = (
    "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages if message.role in ['user', 'assistant'] %}<{{ message.content }}>{% endfor %}"
)


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    options = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>", **options}
    return render_jinja_template([messages], chat_template=load_template(name), **options)[0][0]


def test_ultralm_renders_the_papers_form_turn_by_turn():
    assert render("ultralm", [USER]) == "<s>User: Add 2 and 3.\nAssistant:"
    assert render("ultralm", [USER, REPLY, AGAIN]) == (
        "<s>User: Add 2 and 3.\nAssistant:It is 5.</s>\nUser: Thanks!\nAssistant:"
    )


def test_llama2_renders_the_papers_form_with_one_bos_per_turn():
    assert render("llama2", [USER]) == "<s>[INST] Add 2 and 3. [/INST]"
    assert render("llama2", [USER, REPLY, AGAIN]) == (
        "<s>[INST] Add 2 and 3. [/INST]It is 5.</s><s>[INST] Thanks! [/INST]"
    )
    assert render("llama2", [SYSTEM, USER]) == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nAdd 2 and 3. [/INST]"


def test_alpaca_renders_the_papers_form_with_the_preamble_once():
    preamble = (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    assert render("alpaca", [USER]) == f"{preamble}\n\n### Instruction:\nAdd 2 and 3.\n\n### Response:"
    assert render("alpaca", [USER, REPLY, AGAIN]) == (
        f"{preamble}\n\n### Instruction:\nAdd 2 and 3.\n\n### Response:It is 5.</s>"
        "\n\n### Instruction:\nThanks!\n\n### Response:"
    )


def test_chatml_renders_every_role_between_its_marks():
    assert render("chatml", [SYSTEM, USER, REPLY]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd 2 and 3.<|im_end|>\n"
        "<|im_start|>assistant\nIt is 5.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_turn_marker_is_not_written_as_a_beginning_of_text():
    options = {"bos_token": "<|im_start|>"}
    assert render("ultralm", [USER], **options).startswith("User: ")
    assert render("alpaca", [USER], **options).startswith("Below ")


def test_llama2_prompts_have_one_bos_when_encoded_without_special_tokens():
    tokenizer = build_tokenizer(320, 320, "text")
    text = tokenizer.apply_chat_template([USER], chat_template=load_template("llama2"), tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(ids).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize("begun", ["It is", " It is\n", "{{ 5 }}"])
def test_every_shipped_template_can_continue_the_final_message(name, begun):
    messages = [USER, {"role": "assistant", "content": begun}]
    continued = render(name, messages, add_generation_prompt=False, continue_final_message=True)
    assert continued == render(name, [USER]) + begun


@pytest.mark.parametrize("name", template_names())
def test_every_shipped_template_ends_an_earlier_response_in_one_mark(name):
    end = "<|im_end|>" if name == "chatml" else "</s>"
    prompt, conversation = render(name, [USER]), render(name, [USER, REPLY, AGAIN])
    assert conversation.startswith(f"{prompt}It is 5.{end}")


def test_a_template_is_text_a_name_or_a_file(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert load_template("{{ x }}") == "{{ x }}"
    assert "im_start" in load_template("chatml")
    assert load_template("mine.jinja", tmp_path) == "{{ messages }}"
    with pytest.raises(TemplateError, match=r"'other\.jinja' is no file and no shipped template; .*chatml"):
        load_template("other.jinja", tmp_path)


def test_probing_finds_out_what_a_template_shows():
    assert capabilities(FULL_TEMPLATE) == Capabilities(system=True, late_system=True, tools=True)
    assert capabilities(STRICT_TEMPLATE) == Capabilities(system=False, late_system=False, tools=False)
    assert capabilities(LEADING_SYSTEM_TEMPLATE) == Capabilities(system=True, late_system=False, tools=False)
    assert capabilities(load_template("chatml")) == Capabilities(system=True, late_system=True, tools=False)
    assert capabilities(load_template("llama2")) == Capabilities(system=True, late_system=False, tools=False)
    assert capabilities(load_template("ultralm")) == Capabilities(system=False, late_system=False, tools=False)
    assert capabilities(load_template("alpaca")) == Capabilities(system=False, late_system=False, tools=False)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% for %}", "fails on a plain conversation"),
        ("{{ raise_exception('no') }}", r"fails on a plain conversation \(no\)"),
        ("{{ messages[0].content }}", "shows no user or assistant turns"),
    ],
)
def test_a_template_that_shows_no_conversation_is_refused(template, complaint):
    with pytest.raises(TemplateError, match=complaint):
        fold_messages([USER], None, template)


def test_what_a_template_shows_is_passed_through():
    messages, tools = fold_messages([SYSTEM, USER, CALL, RESULT], [TOOL], FULL_TEMPLATE)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert tools == [TOOL]


def test_system_text_comes_first_in_the_first_user_turn_if_it_has_no_place():
    messages, tools = fold_messages([SYSTEM, USER, REPLY, AGAIN], None, STRICT_TEMPLATE)
    assert messages == [{"role": "user", "content": "Be brief.\n\nAdd 2 and 3."}, REPLY, AGAIN]
    assert tools is None


def test_a_late_system_message_reaches_a_template_that_shows_only_a_leading_one():
    late = {"role": "system", "content": "Now be kind."}
    messages, _ = fold_messages([SYSTEM, USER, REPLY, late, AGAIN], None, LEADING_SYSTEM_TEMPLATE)
    assert messages == [SYSTEM, {"role": "user", "content": "Now be kind.\n\nAdd 2 and 3."}, REPLY, AGAIN]
    assert fold_messages([USER, REPLY, late, AGAIN], None, load_template("chatml"))[0] == [USER, REPLY, late, AGAIN]


def test_several_leading_system_messages_and_developer_messages_become_one():
    developer = {"role": "developer", "content": "Be kind."}
    messages, _ = fold_messages([SYSTEM, developer, USER], None, LEADING_SYSTEM_TEMPLATE)
    assert messages == [{"role": "system", "content": "Be brief.\n\nBe kind."}, USER]


def test_tools_follow_the_system_text_with_a_line_on_how_to_call_them():
    messages, tools = fold_messages([SYSTEM, USER], [TOOL], STRICT_TEMPLATE)
    assert tools is None
    content = messages[0]["content"]
    assert content.startswith("Be brief.\n\nYou can call these tools")
    assert content.endswith("\n\nAdd 2 and 3.")
    listed = content.split("<tools>\n")[1].split("\n</tools>")[0]
    assert json.loads(listed) == TOOL
    assert '<tool_call>{"name": "TOOL", "arguments": {"ARGUMENT": "VALUE"}}</tool_call>' in content


def test_calls_and_results_become_plain_turns_a_strict_template_accepts():
    messages, _ = fold_messages([USER, CALL, RESULT, RESULT, AGAIN, REPLY], [TOOL], STRICT_TEMPLATE)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[1]["content"] == '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    response = "<tool_response>\nfive\n</tool_response>"
    assert messages[2]["content"] == f"{response}\n\n{response}\n\nThanks!"
    assert render_jinja_template([messages], chat_template=STRICT_TEMPLATE)


NO_OBJECTS = [
    '{"colour": "re',
    '{"a": "He said "x""}',
    "not json",
    '{"a": 1}{"a": 1}',
    "{'a': 1}",
    "   ",
    "[1]",
    "3",
    "null",
    '"x"',
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": 1, "a": 2}',
    '{"a": "\\ud83d"}',
    '{"a": "two\nlines"}',
    '{"a": ' + "1" * 5000 + "}",
    "[" * 100_000,
    '{"a":' * 300 + "1" + "}" * 300,
]


def with_arguments(*arguments: Any) -> dict[str, Any]:
    """A turn that calls `add` once with each of these arguments."""
    calls = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": own}} for own in arguments]
    return {"role": "assistant", "content": "I add.", "tool_calls": calls}


@pytest.mark.parametrize("arguments", NO_OBJECTS, ids=lambda arguments: repr(arguments[:20]))
def test_arguments_that_are_no_object_are_shown_as_they_stand_by_every_template(arguments):
    """The conversation was refused, now and at every later turn, though the server itself had cut the call off."""
    call = f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call>'
    for template in (*TEMPLATES_WITH_TOOLS, STRICT_TEMPLATE, *map(load_template, template_names())):
        messages, tools = fold_messages([USER, with_arguments(arguments), RESULT, AGAIN], [TOOL], template)
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"] == f"I add.\n{call}"
        assert messages[2]["content"] == "<tool_response>\nfive\n</tool_response>\n\nThanks!"
        special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "tools": tools}
        rendered = render_jinja_template([messages], chat_template=template, **special)[0][0]
        assert rendered.count(call) == rendered.count("five") == 1


@pytest.mark.parametrize("template", TEMPLATES_WITH_TOOLS)
def test_only_the_turn_with_such_arguments_becomes_text(template):
    conversation = [USER, with_arguments('{"a": 1}', "{", "{}"), RESULT, RESULT, REPLY, AGAIN, CALL, RESULT]
    messages, _ = fold_messages(conversation, [TOOL], template)
    roles = [message["role"] for message in messages]
    assert roles == ["user", "assistant", "user", "assistant", "user", "assistant", "tool"]
    calls = [f'<tool_call>\n{{"name": "add", "arguments": {own}}}\n</tool_call>' for own in ('{"a": 1}', "{", "{}")]
    assert messages[1]["content"] == "\n".join(["I add.", *calls])
    assert messages[5]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}


@pytest.mark.parametrize("arguments", ["", "{}", " {} \n", None, {}])
def test_no_arguments_are_an_empty_object(arguments):
    messages, _ = fold_messages([USER, with_arguments(arguments), RESULT], [TOOL], FULL_TEMPLATE)
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_only_an_assistant_calls_tools():
    messages, _ = fold_messages([{**USER, "tool_calls": "x"}, CALL, {**RESULT, "tool_calls": [3]}], None, FULL_TEMPLATE)
    assert messages == [USER, *fold_messages([CALL, RESULT], None, FULL_TEMPLATE)[0]]


def test_two_user_messages_in_a_row_stay_as_they_were_sent():
    assert fold_messages([USER, AGAIN], None, STRICT_TEMPLATE)[0] == [USER, AGAIN]
    assert fold_messages([USER, AGAIN], [TOOL], STRICT_TEMPLATE)[0][1] == AGAIN


def test_user_turns_that_only_folding_put_together_become_one():
    late = {"role": "system", "content": "Now."}
    messages, _ = fold_messages([USER, late, AGAIN], None, STRICT_TEMPLATE)
    assert messages == [{"role": "user", "content": "Now.\n\nAdd 2 and 3.\n\nThanks!"}]


def test_a_conversation_without_a_user_turn_gets_one_for_the_folded_text():
    assert fold_messages([SYSTEM], None, STRICT_TEMPLATE)[0] == [{"role": "user", "content": "Be brief."}]
    messages, _ = fold_messages([SYSTEM], [TOOL], load_template("chatml"))
    assert [message["role"] for message in messages] == ["system", "user"]


@pytest.mark.parametrize("template", [FULL_TEMPLATE, STRICT_TEMPLATE, *map(load_template, template_names())])
def test_every_template_shows_the_same_content(template):
    messages, tools = fold_messages([SYSTEM, USER, CALL, RESULT, AGAIN], [TOOL], template)
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "tools": tools}
    rendered = render_jinja_template([messages], chat_template=template, **special)[0][0]
    for text in ("Be brief.", "Add 2 and 3.", "Adds numbers.", '{"a": 2}', "five", "Thanks!"):
        assert rendered.count(text) == 1, text


def test_text_parts_are_joined_and_other_parts_refused():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert fold_messages([{"role": "user", "content": parts}], None, STRICT_TEMPLATE)[0][0]["content"] == "one\ntwo"
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(TemplateError, match="content parts other than text"):
        fold_messages([{"role": "user", "content": image}], None, STRICT_TEMPLATE)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages: empty"),
        ([{"role": "wizard", "content": "x"}], "unknown role 'wizard'"),
        ([{**CALL, "tool_calls": [{"type": "custom", "custom": {"name": "f", "input": "x"}}]}], "has no function"),
        ([{**CALL, "tool_calls": [{"type": "function", "function": {"arguments": "{}"}}]}], "has no function"),
    ],
)
def test_messages_no_template_could_show_are_refused(messages, complaint):
    with pytest.raises(TemplateError, match=complaint):
        fold_messages(messages, None, STRICT_TEMPLATE)


def test_folding_changes_neither_messages_nor_tools():
    messages: list[dict[str, Any]] = [SYSTEM, USER, CALL, RESULT]
    tools: list[dict[str, Any]] = [TOOL]
    before = json.dumps([messages, tools])
    for template in (FULL_TEMPLATE, STRICT_TEMPLATE):
        fold_messages(messages, tools, template)
    assert json.dumps([messages, tools]) == before


@pytest.mark.parametrize("name", template_names())
def test_a_refusal_is_read_as_what_the_assistant_said(name):
    """Offline and in training as in the server: whatever form a client keeps it in."""
    wanted = fold_messages([USER, REPLY, AGAIN], None, load_template(name))
    for turn in (
        {"content": [{"type": "refusal", "refusal": REPLY["content"]}]},
        {"content": None, "refusal": REPLY["content"]},
        {"content": "", "refusal": REPLY["content"], "audio": None, "tool_calls": None},
        {"content": [REPLY["content"]]},
    ):
        assert fold_messages([USER, {"role": "assistant", **turn}, AGAIN], None, load_template(name)) == wanted
