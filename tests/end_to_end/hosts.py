"""Several hosts on one machine: namespaces of network, processes, mounts and names, joined by a bridge.

Each has an address, a name, process numbers, /tmp/ray and /dev/shm of its own; all else on the disk they share. A host
lives as long as its first process, and that as long as ours: nothing is left, however the test ends, and the machine's
own network is not touched.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

PREFIX = "10.77.0."
NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")


class NotAllowed(Exception):
    """This machine or user cannot have namespaces; says why."""


@dataclass(frozen=True)
class Connection:
    """An open TCP connection as one end sees it; ends are (address, port). sent, received: payload, bytes."""

    pid: int
    here: tuple[str, int]
    there: tuple[str, int]
    sent: int
    received: int


class Host:
    """A host: `name`, `address`, commands on it, and its end."""

    def __init__(self, name: str, number: int, hosts_file: Path):
        # As Debian sets a host up: its own name means an address that nobody else can reach.
        self.name, self.address = name, f"{PREFIX}{number}"
        hosts_file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        script = " && ".join([
            f"hostname {name}", "mkdir -p /tmp/ray", *(f"mount -t tmpfs none {d}" for d in ("/tmp/ray", "/dev/shm")),
            f"mount --bind {hosts_file} /etc/hosts", "ip link set lo up", "echo ready",
            "exec env --ignore-signal=CHLD cat"])  # whoever dies without a parent leaves no zombie
        self._first = subprocess.Popen(["unshare", *NAMESPACES, "sh", "-c", script], text=True, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._first.stdout and self._first.stderr
        if self._first.stdout.readline() != "ready\n":
            raise NotAllowed(self._first.stderr.read().strip())
        self.pid = psutil.Process(self._first.pid).children()[0].pid  # here; on the host it is 1

    def command(self, *words: str) -> list[str]:
        """The words of a command, to be run on this host."""
        return ["nsenter", f"--target={self.pid}", "--all", "--", *words]

    def run(self, *words: str) -> str:
        """Run a command and return its output. Raises CalledProcessError."""
        return subprocess.run(self.command(*words), check=True, capture_output=True, text=True).stdout

    def connections(self) -> list[Connection]:
        """The established ones of all processes."""
        told = self.run("ss", "-tnpiOH", "state", "established")  # queues, the two ends, and more
        lines = [line.split(maxsplit=4) for line in told.splitlines() if "pid=" in line]
        return [Connection(int(re.findall(r"pid=(\d+)", more)[0]), _end(here), _end(there),
                           _number("bytes_sent", more), _number("bytes_received", more))
                for _, _, here, there, more in lines]

    def off(self) -> None:
        """As if its power were cut: nobody hears from it again, nor that it is gone. A second call does nothing."""
        if self._first.poll() is None:
            subprocess.run(self.command("ip", "link", "set", "eth0", "down"), capture_output=True)
            psutil.Process(self.pid).kill()  # and with it the kernel ends all others
            self._first.wait(timeout=30)


def _end(text: str) -> tuple[str, int]:
    address, port = text.rsplit(":", 1)
    return address.strip("[]").removeprefix("::ffff:"), int(port)


def _number(key: str, text: str) -> int:
    found = re.search(rf"\b{key}:(\d+)", text)
    return int(found[1]) if found else 0


@contextmanager
def network(names: Sequence[str], directory: Path) -> Iterator[list[Host]]:
    """Hosts that can reach each other at PREFIX1, PREFIX2, ...; off in the end. directory: for a few small files.

    Raises NotAllowed.
    """
    missing = [tool for tool in ("unshare", "nsenter", "ip", "ss") if shutil.which(tool) is None]
    if missing:
        raise NotAllowed(f"{', '.join(missing)} not installed (packages util-linux, iproute2)")
    with ExitStack() as stack:
        def host(name: str, number: int) -> Host:
            made = Host(name, number, directory / f"{name}.hosts")
            stack.callback(made.off)
            return made

        switch = host("switch", 254)
        hosts = [host(name, number) for number, name in enumerate(names, 1)]
        try:
            switch.run("ip", "link", "add", "bridge", "type", "bridge")
            switch.run("ip", "link", "set", "bridge", "up")
            for i, h in enumerate(hosts):
                switch.run("ip", "link", "add", f"port{i}", "type", "veth", "peer", "name", "eth0")
                subprocess.run(["nsenter", f"--target={switch.pid}", "--net", "ip", "link", "set", "eth0", "netns",
                                str(h.pid)], check=True, capture_output=True, text=True)
                switch.run("ip", "link", "set", f"port{i}", "master", "bridge", "up")
                h.run("ip", "address", "add", f"{h.address}/24", "dev", "eth0")
                h.run("ip", "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            raise NotAllowed(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        yield hosts
