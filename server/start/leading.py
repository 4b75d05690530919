"""Node 0's side of several machines: where the others meet it, whether they fit, and what happens when one is gone."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from torch.distributed import TCPStore

from ultrafuser.server.engine.shared.interfaces import network_environment
from ultrafuser.server.engine.shared.wire import Wire
from ultrafuser.server.settings import SettingsError
from ultrafuser.server.start.children import end_groups, kill_children
from ultrafuser.server.start.likeness import differences, likeness, one_line
from ultrafuser.server.start.listener import MeetingPoints
from ultrafuser.server.start.preparing import Prepared
from ultrafuser.server.start.progress import StartupProgress

_HELLO_SECONDS = 5.0
_REMIND_SECONDS = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Arrival:
    rank: int
    values: Mapping[str, str]
    wire: Wire


class Followers:
    """The other nodes, connected for as long as the engine runs. If one is gone the engine is ended."""

    def __init__(self, wires: Mapping[int, Wire], store: TCPStore) -> None:
        self._wires = wires
        self._store = store  # the engine's processes meet there for as long as it is held
        self._killed: set[int] = set()
        self._is_left = self._is_wished = False
        self._at_wish: Callable[[], object] | None = None
        for rank, wire in wires.items():
            threading.Thread(target=self._watch, args=(rank, wire), name=f"Node{rank}", daemon=True).start()

    def at_wish(self, end: Callable[[], object]) -> None:
        """What to do when another node was asked to end: all end in order then."""
        self._at_wish = end
        if self._is_wished:
            end()

    def dismiss(self) -> None:
        """Tell the others that the engine has ended in order; they leave then."""
        self._is_left = True
        for wire in self._wires.values():
            wire.send(end=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the others, which end then; nothing of a killed engine is left here."""
        self._is_left = True
        for wire in self._wires.values():
            wire.close()
        end_groups(self._killed)

    def _watch(self, rank: int, wire: Wire) -> None:
        while (message := wire.receive()) is not None:
            if message.get("leave"):
                logger.info("node %d was asked to end; all nodes end", rank)
                self._is_wished = True
                if self._at_wish is not None:
                    with suppress(RuntimeError):  # its loop has ended, and with it the service
                        self._at_wish()
        if not self._is_left:
            logger.error("node %d (%s) is gone; the engine ends on all nodes", rank, wire.address)
            while not self._is_left:  # some may only be about to start
                self._killed = self._killed | kill_children()
                time.sleep(1)


def gather(seconds: float, prepared: Prepared, points: MeetingPoints, progress: StartupProgress) -> Followers:
    """Wait until all other nodes are there and alike.

    Raises:
        SettingsError: one has not come in time, or differs; all that came are told.
    """
    node = prepared.node
    assert node is not None
    own = likeness(prepared)
    os.environ.update(network_environment(os.environ, points.nodes.getsockname()[0]))
    # Else torch would open a port of its own in a worker, for everybody.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with progress.step("meet the other nodes"):
        store = _host_store(points.processes)
        with points.nodes:  # a node that is started again waits for the next engine
            wires, problems = _meet(points.nodes, own, node.num_nodes, seconds, progress)
        refusal = None
        if problems:
            refusal = f"--nnodes: {one_line(problems)}; make all nodes alike, and start them again"
        for wire in wires.values():
            wire.send(refusal=refusal)
        if refusal is not None:
            for wire in wires.values():
                wire.close()
            raise SettingsError(refusal)
    return Followers(wires, store)


def _host_store(listener: socket.socket) -> TCPStore:
    """Where the workers of all nodes find each other, at this node's one address."""
    host, port = listener.getsockname()[:2]
    listener.listen(socket.SOMAXCONN)
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno()))


def _meet(
    listener: socket.socket, own: Mapping[str, str], num_nodes: int, seconds: float, progress: StartupProgress
) -> tuple[dict[int, Wire], list[str]]:
    """Connections by rank, and what is wrong with them."""
    wires: dict[int, Wire] = {}
    problems: dict[int, list[str]] = {}
    listener.listen(socket.SOMAXCONN)
    deadline = time.monotonic() + seconds
    while missing := sorted(set(range(1, num_nodes)) - wires.keys()):
        names = ", ".join(f"node {rank}" for rank in missing)
        left = deadline - time.monotonic()
        if left <= 0:
            problems[0] = [f"{names} did not come within {seconds:g} s; start all {num_nodes} nodes"]
            break
        host, port = listener.getsockname()[:2]
        progress.say(f"      waiting for {names} at {host} port {port}, {left:.0f} s at most")
        arrival = _next_arrival(listener, min(left, _REMIND_SECONDS))
        if arrival is None:
            continue
        rank, wire = arrival.rank, arrival.wire
        if rank in wires and wires[rank].is_open:
            wire.send(refusal=f"--node-rank: node {rank} is there, from {wires[rank].address}; give each its own")
            wire.close()
            continue
        wires[rank] = wire  # in the place of one that has left
        problems[rank] = differences(rank, arrival.values, "node 0", own)
        if rank >= num_nodes:
            problems[rank].append(f"node {rank} is one too many for {num_nodes} nodes")
        for line in problems[rank]:
            logger.error(line)
        if rank >= num_nodes:
            break
    return wires, [line for rank in sorted(problems) for line in problems[rank]]


def _next_arrival(listener: socket.socket, seconds: float) -> _Arrival | None:
    listener.settimeout(seconds)
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        return None
    try:
        wire = Wire(connection)
    except OSError:  # somebody who has left again
        connection.close()
        return None
    hello = wire.receive(_HELLO_SECONDS) or {}
    rank, values = hello.get("rank"), hello.get("likeness")
    if type(rank) is int and rank > 0 and isinstance(values, dict):
        return _Arrival(rank, {str(name): str(value) for name, value in values.items()}, wire)
    logger.warning("a connection from %s is no node's; it is closed", wire.address)
    wire.close()
    return None
