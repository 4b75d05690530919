"""The page of conversations whose tokens are coloured by the gate: one HTML file, without scripts and other files.

Knows shown conversations; does not know how their numbers were taken.
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from gating.analysis.styles import CONTROLS, NUM_LEVELS, Style, level, style_of
from gating.analysis.transcripts import ShownConversation, ShownToken, Turn

STYLE_SHEET = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
"""Colours of single specialists are added. Its `--most` is the opacity of the strongest colour behind a token: text on
it keeps a contrast of 4.5 in both schemes."""

_SPACES = {ord("\n"): "\u240a", ord("\t"): "\u2409", ord(" "): "\u2423"}
"""Where a token stands alone."""


def render_page(fusion: str, specialists: Sequence[str], conversations: Sequence[ShownConversation]) -> str:
    """The whole page.

    Args:
        fusion: name of the model.
        specialists: names, in the fusion's order.
        conversations: in the order in which they are shown.
    """
    style = STYLE_SHEET + "\n".join(_rules([style_of(index) for index in range(len(specialists))])) + "\n"
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = escape(f"Tokens of {fusion}")
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>{style}</style>",
        "</head>",
        "<body>",
        f"<header><h1>{title}</h1>",
        *_legend(specialists),
        "</header>",
        "<main>",
        *(line for conversation in conversations for line in _conversation(conversation, specialists)),
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _rules(styles: Sequence[Style]) -> Iterator[str]:
    for index, style in enumerate(styles):
        red, green, blue = style.rgb
        yield f".s{index} {{ --own: {red} {green} {blue}; text-decoration-style: {style.css_line}; }}"
    for step in range(NUM_LEVELS + 1):
        yield f".w{step} {{ --strength: {step / NUM_LEVELS:.1f}; }}"


def _legend(specialists: Sequence[str]) -> Iterator[str]:
    yield (
        "<p>Each response token has the colour and the underline of the specialist with the largest weight; the colour"
        " is the stronger, the larger that weight. Point at a token for its numbers, or open the table below a"
        " conversation.</p>"
    )
    yield '<ul class="legend">'
    least = 1 / len(specialists)
    for index, name in enumerate(specialists):
        ramp = "".join(
            f'<span class="s{index} w{step}">{least + (1 - least) * step / NUM_LEVELS:.2f}</span>'
            for step in range(0, NUM_LEVELS + 1, 2)
        )
        yield f'<li><b class="s{index} w0">{escape(name)}</b> {ramp}</li>'
    yield "</ul>"


def _conversation(conversation: ShownConversation, specialists: Sequence[str]) -> Iterator[str]:
    tokens = conversation.tokens
    means = ", ".join(
        f"{escape(name)} {weight:.2f}" for name, weight in zip(specialists, conversation.mean_weights, strict=True)
    )
    loss = sum(token.loss for token in tokens) / len(tokens)
    yield f'<section data-domain="{escape(conversation.domain)}" data-number="{conversation.number}">'
    yield f"<h2>{escape(conversation.domain)}, conversation {conversation.number}</h2>"
    yield f"<p>Mean weights: {means}. {len(tokens):,} tokens, {loss:.2f} nats each.</p>"
    for turn in conversation.turns:
        yield from _turn(turn, specialists)
    yield "<details><summary>Numbers of every token</summary>"
    yield from _table(tokens, specialists)
    yield "</details></section>"


def _turn(turn: Turn, specialists: Sequence[str]) -> Iterator[str]:
    # Scrollable regions must be reachable by keyboard.
    yield f'<div class="prompt" tabindex="0" role="region" aria-label="prompt">{_marked(turn.prompt)}</div>'
    yield f'<div class="response">{"".join(_token(token, specialists) for token in turn.tokens)}</div>'


def _token(token: ShownToken, specialists: Sequence[str]) -> str:
    part = "" if token.text else " part"
    title = escape(_title(token, specialists)).replace("\n", "&#10;")
    return f'<span class="t s{token.leader} w{level(token.weights)}{part}" title="{title}">{_marked(token.text)}</span>'


def _title(token: ShownToken, specialists: Sequence[str]) -> str:
    lines = [f"{name} {weight:.3f}" for name, weight in zip(specialists, token.weights, strict=True)]
    lines += [f"loss {token.loss:.3f} nats", f"entropy {token.entropy:.3f} nats"]
    return "\n".join(lines if token.text else ["(part of the character that follows)", *lines])


def _marked(text: str) -> str:
    """Escaped; line ends get a mark that is not part of the text, other control characters a picture."""
    return escape(text.translate(CONTROLS)).replace("\n", '<i class="end"></i>\n')


def _table(tokens: Sequence[ShownToken], specialists: Sequence[str]) -> Iterator[str]:
    header = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["", "token", *specialists, "loss", "entropy"])
    yield f"<table><thead><tr>{header}</tr></thead><tbody>"
    for number, token in enumerate(tokens, start=1):
        values = "".join(f"<td>{value:.3f}</td>" for value in (*token.weights, token.loss, token.entropy))
        text = escape(token.text.translate(CONTROLS | _SPACES))
        yield f'<tr><td>{number}</td><td class="piece">{text}</td>{values}</tr>'
    yield "</tbody></table>"
