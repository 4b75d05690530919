"""Opens data in a process of its own, whose environment names the hub: `huggingface_hub` reads it when imported.

A line of JSON in, `[arguments, cache, limit]`; a line out: the files, or what the user is told.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultrafuser.gating.data.conversations import DataFile
from ultrafuser.gating.data.hub import open_data
from ultrafuser.gating.errors import DataError


class HubReader:
    """That process, seen from here."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def __call__(self, *arguments: str, cache: Path, limit: int | None = None) -> list[DataFile] | str:
        """The files, or the one line that says why not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([arguments, str(cache), limit]), file=self._process.stdin, flush=True)
        answer: Any = json.loads(self._process.stdout.readline())
        return answer if isinstance(answer, str) else [DataFile(Path(path), *rest) for path, *rest in answer]


@contextmanager
def reading(environment: Mapping[str, str], folder: Path) -> Iterator[HubReader]:
    """A reader with these variables, which runs in a folder."""
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gating.data.hub_reader"],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield HubReader(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def main() -> None:
    for line in sys.stdin:
        arguments, cache, limit = json.loads(line)
        try:
            files = open_data(arguments, Path(cache), limit)
            print(json.dumps([[str(file.path), file.domain, file.origin] for file in files]), flush=True)
        except DataError as error:
            print(json.dumps(str(error)), flush=True)


if __name__ == "__main__":
    main()
