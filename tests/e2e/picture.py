"""Take the README's picture of the playground: ask a running server, show one token's card, save a small PNG.

    ultrafuser serve demo
    python -m tests.e2e.picture

Needs Chromium. The look depends on the machine's fonts: Inter (Debian: fonts-inter) is the nicest the page knows.
"""

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image

from tests.e2e.browser import Chromium, Page, find_chromium
from tests.e2e.playground import TOKENS, ask, load

QUESTION = "Write a Python function for the area of a circle. Then compute the area for a radius of 3."
PATH = Path(__file__).parents[2] / "docs" / "images" / "playground.png"
WIDTH, HEIGHT, SCALE = 1280, 860, 1.5
NUM_COLOURS = 192
"""Of the picture: enough for flat areas and text, a third of the bytes."""


def take(page: Page, url: str, question: str, **fields: float) -> bytes:
    """The page after an answer, with the card of the token that leads most clearly in its last third; a PNG."""
    page.resize(WIDTH, HEIGHT, SCALE)
    load(page, url)
    ask(page, question, **fields)
    strengths = f"[...{TOKENS}].map(e => e.textContent.trim() ? Number(e.style.getPropertyValue('--strength')) : -1)"
    late = f"(all => all.map((s, i) => i < all.length * 2 / 3 ? -1 : s))({strengths})"
    page.point_at(f"{TOKENS}[(late => late.indexOf(Math.max(...late)))({late})]")
    page.wait_until("!document.querySelector('#card').hidden")
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    small = picture.quantize(NUM_COLOURS, dither=Image.Dither.NONE)
    out = io.BytesIO()
    small.save(out, format="PNG", optimize=True)
    return out.getvalue()


def main() -> None:
    """Take it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--out", type=Path, default=PATH, help="(default: %(default)s)")
    args = parser.parse_args()
    path = find_chromium()
    if path is None:
        parser.error("there is no Chromium; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        chromium = Chromium(path, Path(profile))
        try:
            with chromium.page() as page:
                page.prefer(prefers_color_scheme="dark" if args.dark else "light")
                picture = take(page, args.url, args.question, temperature=0, max_completion_tokens=args.max_tokens)
        finally:
            chromium.end()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(picture)
    print(f"{args.out}: {len(picture) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
