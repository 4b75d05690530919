"""What an answer says, read from free text: a number, an option's letter, yes or no. Knows no benchmark."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

_NUMBER = re.compile(
    r"""
    (?<![\w.])                                    # not the middle of a word or of another number
    (?P<sign>(?<![\w)\]])[-\u2212])?(?:\$\s?)?    # "-$10"; in "16-3" and "(a)-3" it is no sign
    (?P<inner>(?<=\$)[-\u2212])?                  # "$-10"
    (?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)
    (?P<power>[eE][-+]?[0-9]{1,2}(?!\w))?
    (?:/(?P<under>[1-9][0-9]*)(?![0-9/.]))?
    """,
    re.VERBOSE,
)
_ANSWER_CUE = re.compile(r"(?i)\banswer\b[^.\n:=]{0,60}?(?:\bis\b|:|=)[\s*_$:]*")
_OPERATOR = re.compile(r"\s*[a-zA-Z$%\s]{0,20}(?:[-+*/\u00d7\u00f7=^]|\bx\b)\s*[$0-9(.]")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


def final_number(text: str) -> Fraction | None:
    """The number that an answer ends in.

    Looked for after the last `####`, in the last LaTeX box, after the last "answer is", and else as the last number
    of the text. Commas between thousands, currency and percent signs, decimals, a/b and minus signs are understood.
    """
    text = text.replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("\\,", "")
    marked = text.rpartition("####")[2] if "####" in text else ""
    if numbers := _numbers(marked):
        return numbers[0]
    boxes = _BOXED.findall(text)
    if boxes and (numbers := _numbers(boxes[-1])):
        return numbers[-1]
    if cues := list(_ANSWER_CUE.finditer(text)):
        stated = _stated_number(text[cues[-1].end() :].partition("\n")[0])
        if stated is not None:
            return stated
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def same_number(number: Fraction, expected: str) -> bool:
    """Whether a number is the one that a benchmark's file has, up to a millionth."""
    return abs(number - Fraction(expected.replace(",", ""))) <= Fraction(1, 1_000_000)


def option_letter(text: str, letters: str) -> str | None:
    """The option that an answer chooses, as one of `letters` ("ABCDE"), or None.

    Looked for in the last LaTeX box, after the last "answer", alone on the last line, at the very beginning, after the
    last "option" or "choice", before "is correct", as the last letter in brackets, and as the last one that ends a
    line. Options that the answer merely repeats are passed over.
    """
    text = re.sub(r"\\text\w*|[*_`{}$\\]", "", _BOXED.sub(r" answer: \1 ", text))
    letter = rf"\(?([{letters}])(?![\w'\u2019])"
    lower = rf"\(?([{letters.lower()}])(?=[).\s]*$)"
    cue = r"(?i:\banswer\b)[^.\n:=]{0,60}?(?i:\bis\b|:|=|\n)\W*(?i:(?:option|choice|letter)\W*)?"
    for pattern in (cue + letter, cue + lower, r"(?i:\banswer)\W{0,3}" + letter):
        if found := re.findall(pattern, text):
            return found[-1].upper()
    text = _without_repeated_options(text, letters)
    alone = rf"(?:\A|\n)\W*([{letters}{letters.lower()}])\W*\Z"
    leading = rf"^\W*([{letters}])[).:,]"
    listed = rf"(?i:\b(?:option|choice|choose|select|pick)(?: is)?)\W{{0,3}}(?i:option\W*)?{letter}"
    praised = rf"(?<![\w'\u2019])([{letters}])\)? is (?:the )?(?:correct|right|answer)"
    bracketed = rf"\(([{letters}{letters.lower()}])\)"
    last = rf"(?m)(?<![\w'\u2019])([{letters}])\W*$"
    for pattern in (alone, leading, listed, praised, bracketed, last):
        if found := re.findall(pattern, text):
            return found[-1].upper()
    return None


def yes_probability(candidates: Sequence[tuple[str, float]]) -> float | None:
    """P(Yes) / (P(Yes) + P(No)) of a first token, all spellings summed; None if neither is among the candidates.

    Args:
        candidates: tokens as text with their log-probabilities in nats. One word of the two missing counts as 0.
    """
    mass = {"yes": 0.0, "no": 0.0}
    for token, logprob in candidates:
        word = _bare(token)
        if word in mass:
            mass[word] += math.exp(logprob)
    total = mass["yes"] + mass["no"]
    return mass["yes"] / total if total > 0 else None


def yes_or_no(text: str) -> bool | None:
    """Whether a text says yes: by its first word if that is one of the two, else by the only one of them in it."""
    words = [_bare(word) for word in re.findall(r"\w+", text)]
    if words and words[0] in ("yes", "no"):
        return words[0] == "yes"
    said = {word for word in words if word in ("yes", "no")}
    return said == {"yes"} if len(said) == 1 else None


def _numbers(text: str) -> list[Fraction]:
    return [_value(match) for match in _NUMBER.finditer(text)]


def _value(match: re.Match[str]) -> Fraction:
    value = Fraction(match["digits"].replace(",", "") + (match["power"] or "")) / int(match["under"] or 1)
    return -value if match["sign"] or match["inner"] else value


def _stated_number(text: str) -> Fraction | None:
    """The number of a statement: its first, or, if that begins a calculation, what stands after the last `=`."""
    first = _NUMBER.search(text)
    if first is None:
        return None
    result = text.rpartition("=")[2] if "=" in text[first.end() :] else ""
    if _OPERATOR.match(text, first.end()) and (numbers := _numbers(result)):
        return numbers[0]
    return _value(first)


def _without_repeated_options(text: str, letters: str) -> str:
    """The text without the lines that begin as options do, if there are several such lines."""
    marker = re.compile(rf"\s*(?:[-•]\s*)?\(?([{letters}])[).:]")
    marked = [marker.match(line) for line in text.splitlines()]
    if len({match[1] for match in marked if match}) < 2:
        return text
    return "\n".join(line for line, match in zip(text.splitlines(), marked, strict=True) if not match)


def _bare(token: str) -> str:
    """A token without what tokenizers and Markdown put around a word."""
    return token.strip(" \t\r\nĠ▁Ċ*_\"'`.,:;!").casefold()
