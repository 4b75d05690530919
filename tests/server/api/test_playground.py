"""The playground's files over HTTP: each with its type and a strict policy, nothing beside them, and only if wanted."""

import re
from collections.abc import AsyncIterator

import httpx
import pytest
from pydantic import SecretStr

from tests.server.scripted import ScriptedEngine
from ultrafuser.gating.analysis.styles import PALETTE, style_of
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.server.api.playground import FILES, FOLDER
from ultrafuser.server.app import create_app
from ultrafuser.server.health import Readiness
from ultrafuser.server.serving.serving import build_serving
from ultrafuser.server.settings import ServerSettings

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_file())
PAGE = (FOLDER / "index.html").read_text()
each_path = pytest.mark.parametrize("path", FILES)


@pytest.fixture
async def hidden(
    engine: ScriptedEngine, fusion: FusionConfig, info: FusedModelInfo, readiness: Readiness
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with keys and without the page."""
    settings = ServerSettings(playground=False, api_key=(SecretStr("key"),))
    app = create_app(build_serving(engine, fusion, info, settings), settings, readiness)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.fixture
async def guarded(
    engine: ScriptedEngine, fusion: FusionConfig, info: FusedModelInfo, readiness: Readiness
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with keys, behind a proxy's prefix."""
    settings = ServerSettings(api_key=(SecretStr("key"),), root_path="/models")
    app = create_app(build_serving(engine, fusion, info, settings), settings, readiness)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@each_path
async def test_a_file_comes_with_its_type_and_a_policy_that_allows_no_other_source(
    client: httpx.AsyncClient, path: str
) -> None:
    response = await client.get(path)
    assert response.status_code == 200
    assert response.content == (FOLDER / FILES[path]).read_bytes()
    assert response.headers["content-type"].partition(";")[0] == TYPES[FILES[path].rpartition(".")[2]]
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


@each_path
async def test_a_file_that_the_browser_has_is_not_sent_again(client: httpx.AsyncClient, path: str) -> None:
    tag = (await client.get(path)).headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        response = await client.get(path, headers={"If-None-Match": known})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", tag)
    assert (await client.get(path, headers={"If-None-Match": '"other"'})).status_code == 200
    assert (await client.head(path)).status_code == 200


def test_every_file_of_the_page_is_served_and_no_other() -> None:
    """Served is what the page leads to, by links and imports; a file that lies beside them would need no key either."""
    reached: set[str] = set()
    found = {"index.html"}
    while found - reached:
        name = min(found - reached)
        reached.add(name)
        found |= set(re.findall(r"""(?:"playground/|from "\./)([\w.]+)\"""", (FOLDER / name).read_text()))
    assert sorted({*FILES.values()}) == NAMES == sorted(reached)


@pytest.mark.parametrize(
    "path",
    [
        "/playground",
        "/playground/",
        "/playground/index.html",
        "/playground/../settings.py",
        "/playground/%2e%2e/settings.py",
        "/playground/..%2fsettings.py",
        "/playground//etc/passwd",
        "/playground/style.css/",
        "/playground/app.js%00",
        "/index.html",
    ],
)
async def test_nothing_else_is_found(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/json"


async def test_files_can_only_be_read(client: httpx.AsyncClient) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert (await client.request(method, "/")).status_code == 405


@each_path
async def test_the_page_needs_no_key_and_works_behind_a_prefix(guarded: httpx.AsyncClient, path: str) -> None:
    assert (await guarded.get(path)).status_code == 200
    assert (await guarded.get(f"/models{path}")).status_code == 200
    assert (await guarded.get("/v1/models")).status_code == 401


def test_the_page_names_its_files_relative_to_itself_and_carries_no_script_or_style() -> None:
    named = re.findall(r'(?:src|href)="([^"#]+)"', PAGE)
    assert {f"/{name}" for name in named} <= set(FILES)
    assert len(named) > 4
    assert not re.search(r"<style|<script(?![^>]* src=)|\son[a-z]+=|\sstyle=", PAGE)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".js")])
def test_a_script_writes_text_never_markup_stores_nothing_and_loads_its_own_kind_only(name: str) -> None:
    text = (FOLDER / name).read_text()
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|localStorage|sessionStorage|cookie|eval\(|://"
    assert re.findall(forbidden, text) == []
    imported = re.findall(r'from "(.+?)"', text) + re.findall(r'import\("(.+?)"\)', text)
    assert {f"/playground/{path.removeprefix('./')}" for path in imported} <= set(FILES)
    assert len(text.splitlines()) <= 300


def test_specialists_look_as_in_the_pictures_of_the_analysis() -> None:
    sheet = (FOLDER / "style.css").read_text()
    colours = re.findall(r"^\.colour-(\d) \{ --own: (#\w{6}); \}", sheet, re.MULTILINE)
    assert colours == [(str(index), colour) for index, colour in enumerate(PALETTE)]
    lines = re.findall(r"^\.line-(\d) \{ --line: (\w+); \}", sheet, re.MULTILINE)
    assert lines == [(str(index), style_of(index).css_line) for index in range(5)]
    marks = (FOLDER / "marks.js").read_text()
    assert f"NUM_COLOURS = {len(colours)};" in marks
    assert f"NUM_LINES = {len(lines)};" in marks


async def test_the_page_can_be_switched_off(hidden: httpx.AsyncClient) -> None:
    for path in FILES:
        assert (await hidden.get(path)).status_code == 404


async def test_the_models_name_their_specialists(client: httpx.AsyncClient) -> None:
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert model["specialists"] == ["text", "code", "math"]
