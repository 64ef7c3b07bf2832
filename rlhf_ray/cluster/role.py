"""What every role has in common."""

import os
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.cluster.health import Pulse
from rlhf_ray.metrics.memory import own_pulse_numbers

ROLE_ENV = {
    # Nothing that runs in a role asks a hub or a usage server for anything.
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1",
    # glibc gives large pieces of memory back to the system at once; to be given the same activations anew, page by
    # page, was 8% of the passes and steps of a small model on CPU. Up to 1 GiB stays. All threads share one arena:
    # calls run on others than the first, whose own arenas are made of parts of 64 MiB, and what is larger is not kept.
    "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_ARENA_MAX": "1",
    # A thread that waits for the others of its pass does so asleep: roles share processors, and one that spins takes
    # the core that another role's thread waits for.
    "OMP_WAIT_POLICY": "PASSIVE",
}


class Role:
    """Base of all Ray actors of the project.

    Constructors do nothing: `setup` loads and connects, so that what it raises arrives at the driver as it was
    raised (Ray turns an error in a constructor into "the actor died").
    """

    def setup(self, *args: Any) -> None:
        """Load and connect."""

    def describe(self) -> dict[str, Any]:
        """Name, class, node and process of this actor, and the files of its standard output and error."""
        context = ray.get_runtime_context()
        return {
            "name": context.get_actor_name() or "",
            "actor_class": type(self).__name__,
            "node": ray.util.get_node_ip_address(),
            "node_id": context.get_node_id(),
            "pid": os.getpid(),
            "logs": tuple(str(Path(f"/proc/self/fd/{fd}").resolve()) for fd in (1, 2)),
        }

    def pulse(self) -> Pulse:
        """A sign of life, on a thread of its own (concurrency group `health`)."""
        return Pulse(*own_pulse_numbers())
