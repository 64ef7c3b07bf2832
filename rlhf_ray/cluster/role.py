"""What every role has in common."""

import os
from typing import Any

import ray


class Role:
    """Base of all Ray actors of the project.

    Constructors do nothing: `setup` loads and connects, so that what it raises arrives at the driver as it was
    raised (Ray turns an error in a constructor into "the actor died").
    """

    def setup(self, *args: Any) -> None:
        """Load and connect."""

    def describe(self) -> dict[str, str | int]:
        """Name, class, node and process of this actor."""
        context = ray.get_runtime_context()
        return {
            "name": context.get_actor_name() or "",
            "actor_class": type(self).__name__,
            "node": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
        }
