"""Files are there whole or not at all, and lines are read from whole files only."""

import gzip
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from ultrafuser.gating.errors import DataError
from ultrafuser.gating.files import read_json_lines, read_lines, replacing, split_name, write_json


def write_text(path: Path, text: str) -> None:
    path.write_text(text)


def write_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "inner").write_text(text)


def read(path: Path) -> str:
    return (path / "inner" if path.is_dir() else path).read_text()


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "manifest.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("write", [write_text, write_folder])
def test_a_file_or_folder_takes_its_place_at_the_end_and_stays_after_an_error(
    write: Callable[[Path, str], None], tmp_path: Path
) -> None:
    target = tmp_path / "made" / "target"
    for text in ("first", "second"):
        with replacing(target) as partial:
            write(partial, text)
    with suppress(RuntimeError), replacing(target) as partial:
        write(partial, "third")
        raise RuntimeError
    assert read(target) == "second"
    assert list(target.parent.iterdir()) == [target], "nothing is left beside it"


@pytest.mark.parametrize("leave", [write_text, write_folder])
def test_what_a_killed_process_left_is_not_mistaken_for_content(
    leave: Callable[[Path, str], None], tmp_path: Path
) -> None:
    leave(tmp_path / "target.partial", "half")
    with replacing(tmp_path / "target") as partial:
        write_folder(partial, "whole")
    assert read(tmp_path / "target") == "whole"


def test_lines_have_their_numbers_and_the_share_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n"b"\n')
    assert [(number, line) for number, line, _ in read_lines(path)] == [(1, b'{"a": 1}\n'), (3, b'"b"\n')]
    assert [share for *_, share in read_lines(path)][-1] == 1.0
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (3, "b")]


def broken(content: bytes) -> bytes:
    """Gzipped bytes of which some in the middle are others."""
    whole = bytearray(gzip.compress(content, mtime=0))
    whole[20:40] = bytes(20)
    return bytes(whole)


@pytest.mark.parametrize(
    "content",
    [b"plain", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:40], broken(bytes(range(256)) * 40)],
    ids=["plain", "cut short", "broken"],
)
def test_a_file_that_is_no_whole_gzip_is_a_data_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^a\.jsonl\.gz:\d+: not a whole gzip file .*; compress it again"):
        list(read_lines(path))


@pytest.mark.parametrize("line", [b"{", b'"\xff"'])
def test_a_line_that_is_not_json_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + line + b"\n")
    with pytest.raises(DataError, match=r"^a\.jsonl:2: not JSON .*; give one JSON object a line"):
        list(read_json_lines(path))


def test_a_name_before_a_path_is_split_off_unless_the_whole_is_one(tmp_path: Path) -> None:
    assert split_name("code=a.jsonl") == ("code", Path("a.jsonl"))
    assert split_name("a.jsonl") == ("", Path("a.jsonl"))
    path = tmp_path / "a=b.jsonl"
    path.touch()
    assert split_name(str(path)) == ("", path)
    assert split_name("~") == ("", Path.home())
