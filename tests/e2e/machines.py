"""Machines for one engine: network namespaces on one switch, each with its own /dev/shm, address and loopback.

Nothing of them is seen by the machine they stand on, and they reach nothing but each other.
"""

import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import which
from typing import Self

import pytest

from tests.e2e.process import ServerProcess

START_SECONDS = 600.0
"""Each process imports vLLM: for three machines a dozen, on two cores."""

_CLONE_NEWNET = 0x40000000
_OWN_SHARED_MEMORY = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'


class Machines:
    """So many machines, numbered from 0; skips the test where they cannot be had."""

    _hubs = itertools.count()

    def __init__(self, count: int) -> None:
        self._hub = f"uf{os.getpid()}-{next(self._hubs)}"
        self._names = [f"{self._hub}-{rank}" for rank in range(count)]

    def __enter__(self) -> Self:
        if which("ip") is None or which("unshare") is None:
            pytest.skip("needs ip and unshare; on Debian: apt-get install iproute2")
        try:
            _ip("netns", "add", self._hub)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"may not make network namespaces: {error.stderr.strip()}")
        _ip("-n", self._hub, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._hub, "link", "set", "switch", "up")
        for rank, name in enumerate(self._names):
            _ip("netns", "add", name)
            _ip("-n", self._hub, "link", "add", f"port{rank}", "type", "veth", "peer", "eth0", "netns", name)
            _ip("-n", self._hub, "link", "set", f"port{rank}", "master", "switch", "up")
            _ip("-n", name, "address", "add", f"{self.address(rank)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self._names, self._hub]:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)

    def address(self, rank: int) -> str:
        """A machine's one address on the network."""
        return f"10.77.0.{10 + rank}"

    def start(self, rank: int, fusion: Path, log: Path, *options: str) -> ServerProcess:
        """`ultrafuser serve` on one of them, as one node of all."""
        nodes = ["--nnodes", str(len(self._names)), "--node-rank", str(rank), "--master-addr", self.address(0)]
        return ServerProcess(fusion, log, *nodes, *options, around=self.around(rank))

    def around(self, rank: int) -> list[str]:
        """What makes a command run on one of them."""
        namespaces = ["ip", "netns", "exec", self._names[rank], "unshare", "--mount", "--propagation", "private"]
        return [*namespaces, "sh", "-c", _OWN_SHARED_MEMORY, "sh"]

    @contextmanager
    def on(self, rank: int) -> Iterator[None]:
        """Within, this thread's connections begin on that machine."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self._names[rank]}") as there:
            assert libc.setns(there.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(home.fileno(), _CLONE_NEWNET) == 0

    def unplug(self, rank: int) -> None:
        """Take a machine off the network, without a word to anybody."""
        _ip("-n", self._hub, "link", "set", f"port{rank}", "down")

    def plug_in(self, rank: int) -> None:
        """Put it back."""
        _ip("-n", self._hub, "link", "set", f"port{rank}", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
