"""Whose turn it is on the devices that generator i and policy rank i share (cluster.placement=colocated, with GPUs).

    rollout          generators awake            learners in host memory
    score … update   generators asleep           learners on the device
    weight sync      generators' weights awake   learners' parameters on the device, optimizer in host memory

An engine that sleeps has given up its cache and its weights (they come with the next sync), so it is stale. Every step
may be asked for twice, and after any failure: whoever is already there stays.
"""

from rlhf_ray.actors.generator import Generator
from rlhf_ray.actors.policy import PolicyLearner
from rlhf_ray.cluster.group import Group


class Turns:
    """shared: whether they share devices at all; else nothing ever happens here."""

    def __init__(self, generators: Group, policy: Group, shared: bool):
        self.generators, self.policy, self.shared = generators, policy, shared

    def sample(self) -> None:
        if self.shared:
            self.policy.call(PolicyLearner.offload, True)
            self.generators.call(Generator.wake)

    def learn(self) -> None:
        if self.shared:
            self.generators.call(Generator.sleep)
            self.policy.call(PolicyLearner.reload)

    def sync(self) -> None:
        if self.shared:
            self.policy.call(PolicyLearner.reload)
            self.policy.call(PolicyLearner.offload, False)
            self.generators.call(Generator.wake_weights)
