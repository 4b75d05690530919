"""A stand-in for the Hugging Face hub: the part of its HTTP API that `huggingface_hub` and `datasets` ask for a data
set's commit, its list of files, and pieces of these. It notes what it was asked, and how many bytes it gave."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT, OTHER_COMMIT = "1" * 40, "2" * 40


@dataclass
class Hub:
    """What it has, and what happened."""

    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    """Commits by data set and branch."""

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    """Contents by data set and commit, by path."""

    asked: list[str] = field(default_factory=list)
    num_bytes: int = 0
    """Of files, all together."""

    gated: frozenset[str] = frozenset()
    address: str = ""

    def add(self, repo: str, files: dict[str, bytes], commit: str = COMMIT) -> None:
        """Make a commit the newest one of a data set's main branch."""
        self.revisions.setdefault(repo, {})["main"] = commit
        self.files[repo, commit] = files

    def environment(self, home: str) -> dict[str, str]:
        """What makes a process ask this hub; `home` is for its caches."""
        off = dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET"), "1")
        return {"HF_ENDPOINT": self.address, "HF_HOME": home, **off}


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """A hub on a free port, until the end of the block."""
    hub = Hub()

    class Handler(_Handler):
        own = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    own: Hub

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.own.asked.append(f"{self.command} {path}")
        match = re.fullmatch(r"/api/datasets/(\w+/\w+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", path)
        if match or (match := re.fullmatch(r"/datasets/(\w+/\w+)/(resolve)/([^/]+)/(.+)", path)):
            repo, kind, revision, place = match.groups()
        else:
            return self._send_json(404, {})
        if repo not in self.own.revisions:
            return self._fail(404, "RepoNotFound")
        if repo in self.own.gated:
            return self._fail(403, "GatedRepo")
        commit = self.own.revisions[repo].get(revision or "main", revision)
        if (repo, commit) not in self.own.files:
            return self._fail(404, "RevisionNotFound")
        files = self.own.files[repo, commit]
        if kind == "tree":
            return self._send_json(200, self._list(files, f"{place}/" if place else ""))
        if kind == "paths-info":
            wanted = json.loads(body)["paths"]
            return self._send_json(200, [self._entry(path, files[path]) for path in wanted if path in files])
        if kind == "resolve":
            return self._send_file(commit, files, place)
        siblings = [{"rfilename": path} for path in files]
        return self._send_json(200, {"id": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _list(self, files: dict[str, bytes], prefix: str) -> list[dict[str, Any]]:
        """All files below a folder if the request says so, else its own files and folders."""
        found = [path.removeprefix(prefix) for path in files if path.startswith(prefix)]
        is_recursive = "recursive=true" in self.path.lower()
        folders = {path.partition("/")[0] for path in found if "/" in path}
        own = [path for path in found if is_recursive or "/" not in path]
        entries = [{"type": "directory", "path": prefix + name, "oid": "0" * 40} for name in sorted(folders)]
        return entries + [self._entry(prefix + path, files[prefix + path]) for path in own]

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": f"{abs(hash(content)):040x}"[:40]}

    def _send_file(self, commit: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._fail(404, "EntryNotFound")
        content = files[path]
        begin, end = 0, len(content)
        if piece := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(piece[1]), min(int(piece[2] or end) + 1, end)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{path}"', "Accept-Ranges": "bytes"}
        if piece:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        if self.command == "GET":
            self.own.num_bytes += end - begin
        return self._send(206 if piece else 200, content[begin:end], headers)

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send_json(self, status: int, content: object) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
