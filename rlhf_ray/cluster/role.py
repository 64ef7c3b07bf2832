"""What every role has in common."""

import os

import ray


class Role:
    """Base of all Ray actors of the project."""

    def describe(self) -> dict[str, str | int]:
        """Name, class, node and process of this actor."""
        context = ray.get_runtime_context()
        return {
            "name": context.get_actor_name() or "",
            "actor_class": type(self).__name__,
            "node": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
        }
