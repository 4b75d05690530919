"""Is a text fit for training? Length, language, refusal, truncation; each has a name that reports count it by.

Rules of thumb, made to be wrong rarely where they reject: a language is only judged on enough prose and when it is
clear, a refusal only by how an English answer begins. Knows texts, not where they come from.
"""

import re
from functools import cache
from typing import Any

from ultrafuser.gating.synthesis.stages.domain import Limits

TOO_SHORT, TOO_LONG, LANGUAGE = "too_short", "too_long", "language"
REFUSAL, TRUNCATED = "refusal", "truncated"

# What has no language: code, formulas, addresses.
_NOT_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|https?://\S+", re.DOTALL
)
_LEAST_LETTERS = 40
_CLEAR = 0.9
_MOST_CHARACTERS = 2000
_REFUSAL = re.compile(
    r"\W*(?:(?:i am|i'm) (?:very |so |really )?(?:sorry|afraid)|i apologi[sz]e|sorry|unfortunately)?[\s,.;:]*"
    r"(?:but |that )?(?:as an? (?:ai|artificial|language|large language)\b"
    r"|i (?:cannot|can't|can not|won't|will not|am not able to|am unable to|must decline)(?: to)? (?:\w+ )?"
    r"(?:help|assist|comply|fulfil|provide|answer|create|write|generate|do that|support|engage|with (?:that|this))"
    r"|i'm (?:not able|unable) to)",
    re.IGNORECASE,
)


def text_problem(text: str, least: int, most: int, language: str | None) -> str:
    """Why a text is rejected; empty if it is not. Lengths in characters."""
    if len(text) < least:
        return TOO_SHORT
    if len(text) > most:
        return TOO_LONG
    return LANGUAGE if language and not is_language(text, language) else ""


def response_problem(text: str, finish_reason: str, limits: Limits, language: str | None) -> str:
    """Why a response is rejected; empty if it is not."""
    if finish_reason == "length":
        return TRUNCATED
    if is_refusal(text) or finish_reason == "content_filter":
        return REFUSAL
    return text_problem(text, limits.response_min, limits.response, language)


def is_refusal(text: str) -> bool:
    """Whether an English text begins as refusals do."""
    return _REFUSAL.match(text[:200].replace("\u2019", "'")) is not None


def is_language(text: str, language: str) -> bool:
    """Whether the prose in a text may be of a language; true for texts with too little of it to tell."""
    prose = _NOT_PROSE.sub(" ", text)[:_MOST_CHARACTERS]
    if sum(character.isalpha() for character in prose) < _LEAST_LETTERS:
        return True
    found, probability = _identifier().classify(prose)
    return found == language or probability < _CLEAR


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
