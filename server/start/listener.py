"""The socket the server listens on: bound before anything is loaded, so that a taken port is known at once."""

import errno
import socket
from dataclasses import dataclass
from typing import Self

from ultrafuser.server.settings import ServerSettings, SettingsError


@dataclass(frozen=True)
class MeetingPoints:
    """Where several machines meet at node 0; bound from the start, so that nobody takes the ports meanwhile."""

    processes: socket.socket
    """For the engine's processes (torch)."""

    nodes: socket.socket
    """For the nodes themselves."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.processes.close()
        self.nodes.close()


def meeting_points(settings: ServerSettings) -> MeetingPoints:
    """Sockets at `master_addr` alone.

    Raises:
        SettingsError: as `listen_on`.
    """
    assert settings.master_addr is not None
    processes = listen_on(settings.master_addr, settings.master_port, "--master-port")
    try:
        return MeetingPoints(processes, listen_on(settings.master_addr, settings.master_port + 1, "--master-port"))
    except SettingsError:
        processes.close()
        raise


def listen_on(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A bound socket; it accepts nobody before the server starts. `flag` is what has set its port.

    Raises:
        SettingsError: the address is in use, not this machine's, or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        is_taken = error.errno == errno.EADDRINUSE
        way_out = f"end the program that listens there, or choose another {flag}" if is_taken else "correct the address"
        reason = (error.strerror or str(error)).lower()
        raise SettingsError(f"cannot listen on {host} port {port}: {reason}; {way_out}") from error
    return listener


def base_url(settings: ServerSettings, listener: socket.socket) -> str:
    """Where clients on this machine reach the server, without `/v1`."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{settings.root_path}"
