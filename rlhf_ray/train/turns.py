"""Whose turn it is on devices that generators and learners share (cluster.placement=colocated, with GPUs): generator i
and policy rank i, and a critic that asks for a share of a GPU.

    rollout          generators awake            learners in host memory
    score … update   generators asleep           learners on the device
    weight sync      generators' weights awake   learners' parameters on the device, optimizers in host memory

An engine that sleeps has given up its cache and its weights (they come with the next sync), so it is stale. Every step
may be asked for twice, and after any failure: whoever is already there stays.
"""

from collections.abc import Sequence

from rlhf_ray.actors.generator import Generator
from rlhf_ray.actors.learner_role import LearnerRole
from rlhf_ray.cluster.group import Group


class Turns:
    """learners: those that share devices with generators, the policy first; if there are none, nothing ever happens."""

    def __init__(self, generators: Group, learners: Sequence[Group]):
        self.generators, self.learners = generators, learners
        self.stale = False  # the engines have slept since they were last synced

    @property
    def shared(self) -> bool:
        return bool(self.learners)

    def sample(self) -> None:
        if self.shared:
            for learner in self.learners:
                learner.call(LearnerRole.offload, True)
            self.generators.call(Generator.wake)

    def learn(self) -> None:
        if self.shared:
            self.stale = True
            self.generators.call(Generator.sleep)
            for learner in self.learners:
                learner.call(LearnerRole.reload)

    def sync(self) -> None:
        if self.shared:
            policy, *others = self.learners
            for learner in others:  # if it is in host memory already, it stays there
                learner.call(LearnerRole.offload, False)
            policy.call(LearnerRole.reload)
            policy.call(LearnerRole.offload, False)
            self.generators.call(Generator.wake_weights)
