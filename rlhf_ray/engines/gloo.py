"""Which of its addresses a host offers to the others of a gloo group.

Left alone, gloo takes the one that the host's own name resolves to. On many systems (Debian's 127.0.1.1) no other host
reaches that.
"""

import os
import socket

import psutil

_KEY = "GLOO_SOCKET_IFNAME"
_CHOSEN = os.environ.get(_KEY)  # by the user


def bind_towards(address: str) -> None:
    """Groups that this process joins from here on use the interface that leads to `address`, where they meet.

    GLOO_SOCKET_IFNAME in the environment has the last word. Raises OSError if no way leads there.
    """
    if _CHOSEN:
        return
    family, _, _, _, there = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)  # sends nothing
        mine = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == mine for a in addresses):
            os.environ[_KEY] = name
            return
    os.environ.pop(_KEY, None)
