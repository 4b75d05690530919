"""The text of a message: of its content, whole or in parts, and of the refusal that an assistant's turn may be instead.
Knows no templates."""

from collections.abc import Mapping
from typing import Any

from ultrafuser.gating.templates.load import TemplateError

TEXT_PARTS: Mapping[str, str] = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are text, and the key that has it; every other type is media, a file, or a thought."""

REASONING_FIELDS = ("reasoning", "reasoning_content")
"""Names of a message's field that has what was thought before it."""


def text_of_part(part: Any) -> str | None:
    """The text of one part of a content; None if it is none."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(TEXT_PARTS.get(kind)) if isinstance(kind, str) else None
    return text if isinstance(text, str) else None


def text_of_message(message: Mapping[str, Any]) -> str:
    """The text of a message, "" if it has none; parts stand in a line each, a refusal after the content.

    Raises:
        TemplateError: there is something else than text.
    """
    content = message.get("content")
    texts = [text_of_part(part) for part in ([content] if isinstance(content, str) else content or ())]
    if message.get("role") == "assistant" and message.get("refusal"):
        texts = [*filter(lambda text: text != "", texts), text_of_part(message["refusal"])]
    if None in texts:
        raise TemplateError("messages: content parts other than text cannot be read; send text")
    return "\n".join(text for text in texts if text is not None)


def reasoning_of(message: Mapping[str, Any]) -> str | None:
    """What an assistant's turn was thought to say before it, under either of its names; None if nothing is.

    Raises:
        TemplateError: it is not text, or the two say different things.
    """
    found = [message[name] for name in REASONING_FIELDS if message.get(name)]
    if not all(isinstance(text, str) for text in found):
        raise TemplateError(f"{' and '.join(REASONING_FIELDS)} must be text")
    if len(set(found)) > 1:
        raise TemplateError(f"{' and '.join(REASONING_FIELDS)} say different things; send one of them")
    return found[0] if found else None
