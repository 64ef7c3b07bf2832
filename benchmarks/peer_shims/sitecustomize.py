"""Python reads this at the start of every process of the peer's run (PYTHONPATH), also in Ray's workers."""

import os

if os.environ.get("PEER_SHIM") == "1":
    import shim

    shim.install()
