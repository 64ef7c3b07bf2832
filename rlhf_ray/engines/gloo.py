"""Which of its addresses a host offers to the others of a gloo group, and one device for all groups of a process.

Left alone, gloo takes the one that the host's own name resolves to. On many systems (Debian's 127.0.1.1) no other host
reaches that.
"""

import functools
import os
import socket
from datetime import timedelta
from typing import Any

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


@functools.cache  # once in a process
def share_devices() -> None:
    """Groups that this process makes from here on share one gloo device.

    Each device has a thread that wakes up a hundred times in a second, whether there is anything to do or not. vLLM
    makes a dozen groups for an engine of one worker, and whoever wakes up takes a core from a pass.
    """
    from torch.distributed import distributed_c10d as c10d

    devices: dict[str, list[Any]] = {}  # of each value of GLOO_SOCKET_IFNAME

    class Group(c10d.ProcessGroupGloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta = c10d.default_pg_timeout) -> None:
            names = os.environ.get(_KEY, "")
            if names not in devices:
                devices[names] = [self.create_device(interface=name) if name else self.create_default_device()
                                  for name in names.split(",")]
            options = self._Options()  # type: ignore[attr-defined]
            options._timeout, options._devices = timeout, devices[names]
            super().__init__(store, rank, size, options)

    c10d.ProcessGroupGloo = Group  # type: ignore[misc]
