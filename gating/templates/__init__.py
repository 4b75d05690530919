"""Chat templates: where their text comes from, the one rule for what a template cannot express (`fold.py`), what of a
message is text (`content.py`), and special tokens that a conversation spells out (`literals.py`). Knows no models and
no requests."""

from ultrafuser.gating.templates.content import (
    REASONING_FIELDS,
    TEXT_PARTS,
    reasoning_of,
    text_of_message,
    text_of_part,
)
from ultrafuser.gating.templates.fold import TemplateError, fold_messages
from ultrafuser.gating.templates.literals import Literals, Marked
from ultrafuser.gating.templates.load import load_template, template_names

__all__ = [
    "REASONING_FIELDS",
    "TEXT_PARTS",
    "Literals",
    "Marked",
    "TemplateError",
    "fold_messages",
    "load_template",
    "reasoning_of",
    "template_names",
    "text_of_message",
    "text_of_part",
]
