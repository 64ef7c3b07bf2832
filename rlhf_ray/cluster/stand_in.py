"""What Ray starts as a worker, to be replaced by a fork of the zygote: python -I -S stand_in.py SOCKET ARGUMENTS

It ends when the fork does. If the zygote is gone, or not ready after WAIT_S seconds, it becomes the worker itself. It
imports next to nothing.
"""

import json
import os
import socket
import sys

READY = b"r"
WAIT_S = 60.0


def forked(path: str, arguments: list[str]) -> bool:
    """Whether there was a fork; it has ended when this returns."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.settimeout(WAIT_S)
            connection.connect(path)
            if connection.recv(1) != READY:
                return False
        except OSError:
            return False
        text = json.dumps({"argv": arguments, "names": list(os.environ), "values": list(os.environ.values()),
                           "cwd": [os.getcwd()]}).encode()  # noqa: PTH109 - pathlib takes its time
        connection.settimeout(None)
        socket.send_fds(connection, [len(text).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(text)
        return connection.recv(1) == b""


if __name__ == "__main__":
    _, path, *arguments = sys.argv
    if not forked(path, arguments):
        os.execv(sys.executable, [sys.executable, *arguments])
