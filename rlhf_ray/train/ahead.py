"""The next batch, sampled while this one is learnt from: what ppo.schedule=one_step_off adds to the loop.

    synchronous    | sample 1 | learn 1 | sync | sample 2 | learn 2 | sync | ...
    one_step_off   | sample 1 | sync | learn 1  | sync | learn 2  | sync | ...
                                     | sample 2 |      | sample 3 |

So a batch is sampled by the weights before the last update, and by none older. The old log-probabilities are those of
the learners when its turn comes (the proximal policy), and tokens are weighed by exp(theirs - the engine's), truncated
at algorithm.importance_cap (Noukhovitch et al. 2024, "Asynchronous RLHF"; the truncation is that of Espeholt et al.
2018, "IMPALA").

Nothing is sampled ahead of an iteration that ends with a checkpoint of checkpoint.iterations, so that a run which goes
back to one is the same, bit for bit: it begins there as the run that was not cut off does. A run that is asked to stop
saves in between, and what was on its way is sampled anew, as it is after a fault: by weights that are one step newer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from rlhf_ray.core.types import Sample
from rlhf_ray.train.rollout import Rollouts, RolloutWorkers


class Ahead:
    """A rollout on its way, if there is one. prompts: the state of the prompts before it took its own."""

    def __init__(self, workers: RolloutWorkers):
        self._workers, self._pool = workers, ThreadPoolExecutor(1, "ahead")
        self._rollouts: Future[Rollouts] | None = None
        self._dropped = threading.Event()
        self.prompts: dict[str, int] | None = None

    def begin(self, prompts: dict[str, int], samples: Sequence[Sample], version: int, shares: int) -> None:
        """Have RolloutWorkers.run called with these."""
        self.prompts, self._dropped = prompts, threading.Event()
        self._rollouts = self._pool.submit(self._workers.run, list(samples), version, shares, dropped=self._dropped)

    def take(self) -> Rollouts | None:
        """It, when it is there; raises what `run` raises, whose waits have their deadlines."""
        rollouts = self._rollouts.result() if self._rollouts else None
        self._rollouts = self.prompts = None  # not before: who is interrupted while waiting has something to drop
        return rollouts

    def drop(self) -> None:
        """Do without it; the generators are free when this returns, or soon."""
        if self._rollouts:
            self._dropped.set()
            wait_for([self._rollouts])
            self._workers.forget()
        self._rollouts = self.prompts = None
