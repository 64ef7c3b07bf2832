"""gloo binds to the interface that leads to where a group meets."""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from rlhf_ray.engines import gloo


def interfaces(address: str) -> set[str]:
    return {name for name, found in psutil.net_if_addrs().items() if address in {a.address for a in found}}


def test_the_interface_is_that_of_the_way_there(monkeypatch):
    monkeypatch.setattr(gloo, "_CHOSEN", None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is put back
    own = [a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET]
    for address in own:  # what leads to an address of one's own is the interface that has it
        gloo.bind_towards(address)
        assert os.environ["GLOO_SOCKET_IFNAME"] in interfaces(address)
    gloo.bind_towards("localhost")
    assert os.environ["GLOO_SOCKET_IFNAME"] in interfaces("127.0.0.1") | interfaces("::1")


def test_the_user_has_the_last_word(monkeypatch):
    monkeypatch.setattr(gloo, "_CHOSEN", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    gloo.bind_towards("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_name_that_nobody_knows_is_an_error(monkeypatch):
    monkeypatch.setattr(gloo, "_CHOSEN", None)
    with pytest.raises(OSError):
        gloo.bind_towards("no-such-host.invalid")


GROUPS = """
import os, time, torch, torch.distributed as dist
from rlhf_ray.engines.gloo import share_devices
if {shared}:
    share_devices()
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
groups = [dist.new_group([0]) for _ in range(4)]
for group in groups:
    one = torch.ones(1)
    dist.all_reduce(one, group=group)
    assert one.item() == 1.0
time.sleep(1)  # a thread has its name when it first runs
tasks = ["/proc/self/task/" + task + "/comm" for task in os.listdir("/proc/self/task")]
print(sum(open(task).read().startswith("gloo_tcp_loop") for task in tasks))
"""


def test_groups_of_a_process_share_the_thread_that_waits_for_the_network() -> None:
    """Five groups: one thread, not five."""
    loops = [int(subprocess.run([sys.executable, "-c", GROUPS.format(shared=shared)], check=True, capture_output=True,
                                text=True).stdout) for shared in (False, True)]
    assert loops == [5, 1]
