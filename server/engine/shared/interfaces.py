"""The network interface that one engine's nodes talk over: its address, its name, and how the engine is told.

Without this torch and vLLM would each guess an interface. Linux only, like the engine.
"""

import fcntl
import socket
import struct
from collections.abc import Mapping

_SIOCGIFADDR = 0x8915


def interface_of(address: str) -> str | None:
    """The name of this machine's interface that has an IPv4 address; None: no interface has it as its first one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def network_environment(environ: Mapping[str, str], address: str) -> dict[str, str]:
    """Variables that keep the engine's processes to the interface of this node's address; what is set stays."""
    wanted = {"VLLM_HOST_IP": address}
    if name := interface_of(address):
        wanted |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {name: value for name, value in wanted.items() if name not in environ}
