"""The socket the server listens on: bound before anything is loaded, so that a taken port is known at once."""

import errno
import socket

from ultrafuser.server.settings import ServerSettings, SettingsError


def listen_on(host: str, port: int) -> socket.socket:
    """A bound socket; it accepts nobody before the server starts.

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
        way_out = "end the program that listens there, or choose another --port" if is_taken else "correct the address"
        reason = (error.strerror or str(error)).lower()
        raise SettingsError(f"cannot listen on {host} port {port}: {reason}; {way_out}") from error
    return listener


def base_url(settings: ServerSettings, listener: socket.socket) -> str:
    """Where clients on this machine reach the server, without `/v1`."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{settings.root_path}"
