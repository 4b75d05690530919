"""Keys come from flags, the environment and a file; only the right one is found; none is ever shown."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from ultrafuser.server.access.keys import KeyRing, with_all_keys
from ultrafuser.server.settings import ServerSettings, SettingsError, resolve_settings

SECRET = "sk-very-secret"


@pytest.fixture
def ring() -> KeyRing:
    return KeyRing([SecretStr("first"), SecretStr("second")])


def test_a_key_is_found_by_its_number(ring: KeyRing) -> None:
    assert ring.find([(b"host", b"x"), (b"authorization", b"Bearer second")]) == 1
    assert ring.find([(b"authorization", b"bearer first")]) == 0


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [b"first"],
        [b"Basic first"],
        [b"Bearer first "],
        [b"Bearer  first"],
        [b"Bearer FIRST"],
        [b"Bearer fir"],
        [b"Bearer \xff\xfe"],
        [b"Bearer first", b"Bearer first"],
        [b"Bearer first", b"Bearer wrong"],
    ],
)
def test_nothing_else_is(ring: KeyRing, values: list[bytes]) -> None:
    assert ring.find([(b"authorization", value) for value in values]) is None


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ([(b"x-api-key", b"second")], 1),
        ([(b"x-api-key", b"first"), (b"authorization", b"Bearer first")], 0),
        ([(b"x-api-key", b"first"), (b"authorization", b"Bearer second")], None),
        ([(b"x-api-key", b"first"), (b"authorization", b"Bearer wrong")], None),
        ([(b"x-api-key", b"wrong"), (b"authorization", b"Bearer first")], None),
        ([(b"x-api-key", b"first"), (b"authorization", b"Basic first")], None),
        ([(b"x-api-key", b""), (b"authorization", b"Bearer first")], None),
        ([(b"x-api-key", b"first"), (b"x-api-key", b"first")], None),
        ([(b"x-api-key", b"Bearer first")], None),
        ([(b"x-api-key", b"")], None),
    ],
)
def test_anthropics_header_has_the_same_key(
    ring: KeyRing, values: list[tuple[bytes, bytes]], number: int | None
) -> None:
    assert ring.find(values) == ring.find(values[::-1]) == number


def test_a_ring_holds_no_key() -> None:
    assert SECRET not in repr(vars(KeyRing([SecretStr(SECRET)])))


def test_every_key_has_a_salt_of_its_own_and_every_server_others(ring: KeyRing) -> None:
    other = KeyRing([SecretStr("first")])
    assert ring.salt(0) == ring.salt(0)
    assert len({ring.salt(0), ring.salt(1), other.salt(0)}) == 3


def test_a_files_keys_are_added(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n  one \r\ntwo\n")
    settings = with_all_keys(resolve_settings({"api_key": ("zero",), "api_key_file": str(file)}, {}))
    assert [key.get_secret_value() for key in settings.api_key] == ["zero", "one", "two"]


def test_settings_do_not_show_keys() -> None:
    settings = resolve_settings({}, {"api_key": f"{SECRET},other"})
    assert SECRET not in repr(settings) + str(settings.model_dump())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*no such file"),
        (b"", "has no key"),
        (b"# nothing\n\n", "has no key"),
        (b"good\nnot good\n", "line 2 of .* is not plain ASCII without spaces"),
        ("schlüssel".encode(), "line 1 of"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_an_unusable_file_stops_the_start(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=f"--api-key-file: .*{message}"):
        with_all_keys(ServerSettings(api_key_file=str(file)))


@pytest.mark.parametrize("given", [",", f"{SECRET},", f"{SECRET} x", "schlüssel"])
def test_an_unusable_key_stops_the_start_and_is_not_shown(given: str) -> None:
    with pytest.raises(SettingsError, match="--api-key: a key is empty or not plain ASCII") as caught:
        with_all_keys(resolve_settings({}, {"api_key": given}))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["requests_per_minute", "concurrent_requests", "cache_salt_per_key"])
def test_what_is_per_key_needs_keys(name: str) -> None:
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')}: is per key"):
        with_all_keys(resolve_settings({name: "1"}, {}))
