"""Boxes on this process's own row of `ray timeline`.

Ray draws every call of an actor by itself, under the name that `Group.submit` gives it. What only the driver knows,
which phase of which iteration they belong to, is told here. Ray keeps the last 1,000 events of a driver.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ray

CATEGORY = "rlhf"


def span(text: str) -> AbstractContextManager[Any]:
    """A box with this text for as long as the context lasts; nothing where Ray does not run. It costs 2 microseconds.

    `ray._private.profiling.profile` is the same, but silent unless RAY_PROFILING was set before Ray was started.
    """
    worker = getattr(ray._private.worker.global_worker, "core_worker", None)  # internal, so it may go one day
    event = getattr(worker, "profile_event", None)
    return event(CATEGORY.encode(), {"name": text}) if event else nullcontext()
