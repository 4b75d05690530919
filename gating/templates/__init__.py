"""Chat templates: where their text comes from, and the one rule for what a template cannot express (`fold.py`)."""

from gating.templates.fold import TemplateError, fold_messages
from gating.templates.load import load_template, template_names

__all__ = ["TemplateError", "fold_messages", "load_template", "template_names"]
