"""The side of a node that is not the first: it has workers, no scheduler and no HTTP, and ends when node 0 does.

Importing this module imports vLLM.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.server.engine.core.node_workers import NodeWorkers
from ultrafuser.server.engine.shared.interfaces import network_environment
from ultrafuser.server.engine.shared.wire import Wire
from ultrafuser.server.log import adopt_vllm_logging
from ultrafuser.server.settings import EngineStartError, ServerSettings, SettingsError
from ultrafuser.server.start.children import kill_children, tied_children
from ultrafuser.server.start.likeness import likeness
from ultrafuser.server.start.preparing import Prepared, prepare
from ultrafuser.server.start.progress import StartupProgress
from ultrafuser.server.start.signals import STOP_SIGNALS, interrupt

_CONNECT_SECONDS = 3.0
_REMIND_SECONDS = 30.0

logger = logging.getLogger(__name__)


def follow(
    settings: ServerSettings, engine_options: Mapping[str, Any], fusion: FusionConfig, progress: StartupProgress
) -> int:
    """Compute for node 0 until it ends; returns the process's exit status: 0 after an end in order, else 1.

    Raises:
        SettingsError, FusionError, GateError, EngineOptionError: the user can put it right; no weights are loaded yet.
        EngineStartError: a worker could not start, or node 0 has ended meanwhile; the log says why.
    """
    prepared = prepare(settings, engine_options, fusion, progress)
    with progress.step("meet the other nodes"):
        wire = _join(settings, prepared, progress)
    os.environ.update(network_environment(os.environ, wire.own_address))
    leader = _Leader(wire)
    with progress.step("load all specialists into one engine"), tied_children():
        workers = _start(prepared)
    adopt_vllm_logging()
    leader.workers = workers
    progress.say(f"ready: node {settings.node_rank} of {settings.nnodes} computes for {settings.master_addr}")
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, leader.pass_on)
        workers.wait()
    finally:
        workers.shutdown()
        leader.part()
    if leader.has_ended:
        logger.info("node 0 has ended in order; so does this node")
        return 0
    logger.error("the engine has stopped; this node ends")
    return 1


def _start(prepared: Prepared) -> NodeWorkers:
    assert prepared.node is not None
    try:
        return NodeWorkers(prepared.fusion, prepared.engine_options, prepared.node)
    except Exception as error:
        if "initialization failed" not in str(error):
            raise
        raise EngineStartError("this node's workers could not start; the first error above says why") from error


class _Leader:
    """Node 0 as this node knows it: connected, gone, or ended."""

    def __init__(self, wire: Wire) -> None:
        self.workers: NodeWorkers | None = None
        """Set when there are any."""
        self.has_ended = False
        """Whether it said so."""
        self._wire = wire
        self._is_parted = False
        threading.Thread(target=self._watch, name="Node0", daemon=True).start()

    def pass_on(self, _signal: int, _frame: FrameType | None) -> None:
        """A signal to this node ends all in order, node 0's requests first; a second one this node at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, interrupt)
        logger.info("this node was asked to end; node 0 ends first")
        self._wire.send(leave=True)

    def part(self) -> None:
        """Let node 0 see that this node is gone."""
        self._is_parted = True
        self._wire.close()

    def _watch(self) -> None:
        message = self._wire.receive()
        if self._is_parted:
            return
        if message is not None and message.get("end") and self.workers is not None:
            self.has_ended = True
            self.workers.shutdown()
            return
        logger.error("node 0 (%s) is gone; this node ends", self._wire.address)
        while True:  # until this process ends: some may only be about to start
            kill_children()
            time.sleep(1)


def _join(settings: ServerSettings, prepared: Prepared, progress: StartupProgress) -> Wire:
    """A connection to node 0, which has found all nodes alike."""
    deadline = time.monotonic() + settings.node_timeout
    values = likeness(prepared)
    wire = _connect(settings, deadline, progress)
    wire.send(rank=settings.node_rank, likeness=values)
    progress.say("      waiting until node 0 has met all others")
    # Node 0 gives up by itself, and says so.
    verdict = wire.receive(settings.node_timeout + _REMIND_SECONDS)
    if verdict is None or verdict.get("refusal") is not None:
        wire.close()
    if verdict is None:
        raise EngineStartError("node 0 ended before all nodes had met; start them again")
    if verdict.get("refusal") is not None:
        raise SettingsError(str(verdict["refusal"]))
    return wire


def _connect(settings: ServerSettings, deadline: float, progress: StartupProgress) -> Wire:
    host, port = settings.master_addr, settings.master_port + 1
    reminder = 0.0
    while (left := deadline - time.monotonic()) > 0:
        if time.monotonic() > reminder:
            progress.say(f"      waiting for node 0 at {host} port {port}, {left:.0f} s at most")
            reminder = time.monotonic() + _REMIND_SECONDS
        try:
            return Wire(socket.create_connection((host, port), timeout=min(left, _CONNECT_SECONDS)))
        except OSError:
            time.sleep(min(left, 0.5))
    raise SettingsError(
        f"--master-addr: no node 0 at {host} port {port} within {settings.node_timeout:g} s; "
        "start it, or correct --master-addr and --master-port"
    )
