"""The page of coloured tokens: its text is the response's, it runs nothing and loads nothing, it needs no colour."""

import base64
import hashlib
import re
from html.parser import HTMLParser

from tests.gating.analysis.readings import conversation_of
from ultrafuser.gating.analysis.page import STYLE_SHEET, render_page
from ultrafuser.gating.analysis.styles import PALETTE, level, style_of

NAMES = ("text", "co<de")
TEXTS = ["<script>", "alert('1')", "\n", "&amp;", "  \t", "", "中", "\x1b\x00", "\r\n", '"', "<|im_end|>"]
WEIGHTS = [[0.5 + 0.05 * index, 0.5 - 0.05 * index] for index in range(len(TEXTS))]


class Page(HTMLParser):
    """Every element, and the text of every token."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.titles: list[str] = []
        self.is_token = False
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "span" and (attributes.get("class") or "").startswith("t "):
            self.is_token = True
            self.tokens.append("")
            self.titles.append(str(attributes["title"]))

    def handle_endtag(self, tag):
        if tag == "span":
            self.is_token = False

    def handle_data(self, data):
        if self.is_token:
            self.tokens[-1] += data


def page() -> str:
    return render_page("tiny & co", NAMES, [conversation_of(TEXTS, WEIGHTS)])


def test_every_token_is_there_as_it_is_with_control_characters_as_pictures():
    wanted = [text.replace("\x1b", "\u241b").replace("\x00", "\u2400").replace("\r", "\u240d") for text in TEXTS]
    assert Page(page()).tokens == wanted


def test_each_token_tells_its_numbers_and_a_part_of_a_character_says_so():
    titles = Page(page()).titles
    assert titles[1] == "text 0.550\nco<de 0.450\nloss 1.500 nats\nentropy 0.250 nats"
    assert titles[5].startswith("(part of the character that follows)\ntext 0.750\n")


def test_the_numbers_can_be_read_without_a_mouse():
    content = page()
    rows = re.findall(r"<tr><td>(\d+)</td><td class=\"piece\">(.*?)</td>((?:<td>[\d.]+</td>)+)</tr>", content)
    assert [number for number, _, _ in rows] == [str(number) for number in range(1, len(TEXTS) + 1)]
    assert rows[0][2] == "<td>0.500</td><td>0.500</td><td>1.500</td><td>0.250</td>"
    assert rows[2][1] == "\u240a", "a line end is seen where a token stands alone"
    assert "<details><summary>" in content


def test_text_of_data_and_names_becomes_no_markup():
    found = Page(page())
    assert {tag for tag, _ in found.elements} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "ul", "li", "b", "i", "main",
        "section", "div", "span", "details", "summary", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert "<script>" not in page()


def test_the_policy_allows_the_pages_own_style_and_nothing_else():
    content = page()
    found = Page(content)
    policy = next(own["content"] for tag, own in found.elements if "http-equiv" in own)
    (style,) = re.findall(r"<style>(.*?)</style>", content, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    used = {name for _, own in found.elements for name in own}
    assert not used & {"style", "src", "href"}
    assert not [name for name in used if name.startswith("on")]
    assert "url(" not in style


def test_specialists_differ_by_line_as_well_as_by_colour_in_light_and_dark():
    content = page()
    rules = re.findall(r"\.s\d { --own: ([\d ]+); text-decoration-style: (\w+); }", content)
    assert len({colour for colour, _ in rules}) == len({line for _, line in rules}) == len(rules) == 2
    assert "prefers-color-scheme: dark" in content
    looks = {(style_of(index).colour, style_of(index).css_line) for index in range(35)}
    assert len(looks) == 35


def test_text_on_the_strongest_colours_can_be_read_in_light_and_dark():
    light, dark = STYLE_SHEET.split("@media (prefers-color-scheme: dark)", 1)
    for rules in (light, dark.split("}", 1)[0]):
        found = dict(re.findall(r"--(\w+): ([^;]+);", rules))
        share = float(found["most"])
        for colour in PALETTE:
            pairs = zip(_channels(found["paper"]), _channels(colour), strict=True)
            behind = [paper * (1 - share) + own * share for paper, own in pairs]
            assert _contrast(_channels(found["ink"]), behind) >= 4.5, colour


def _channels(colour: str) -> list[float]:
    return [int(colour[begin : begin + 2], 16) / 255 for begin in (1, 3, 5)]


def _contrast(*colours: list[float]) -> float:
    """WCAG's ratio: 4.5 is asked of text."""
    linear = [[part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in own] for own in colours]
    dark, light = sorted(0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in linear)
    return (light + 0.05) / (dark + 0.05)


def test_the_colour_is_the_stronger_the_larger_the_leaders_weight():
    assert [level([0.5, 0.5]), level([0.25, 0.75]), level([1.0, 0.0]), level([1 / 3] * 3)] == [0, 5, 10, 0]
    classes = [own["class"] for tag, own in Page(page()).elements if tag == "span" and "title" in own]
    assert classes[0] == "t s0 w0"
    assert classes[10] == "t s0 w10"
    assert classes[5] == "t s0 w5 part"
    steps = [float(step) for step in re.findall(r"\.w\d+ { --strength: ([\d.]+); }", page())]
    assert steps == sorted(steps)
    assert len(steps) == 11
