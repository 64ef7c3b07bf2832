"""algorithm.name to what it stands for."""

from rlhf_ray.core.algorithms.dr_grpo import DR_GRPO
from rlhf_ray.core.algorithms.grpo import GRPO
from rlhf_ray.core.algorithms.ppo import PPO
from rlhf_ray.core.algorithms.reinforce_pp import REINFORCE_PP
from rlhf_ray.core.algorithms.rloo import RLOO
from rlhf_ray.core.algorithms.spec import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    "ppo": PPO,
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "rloo": RLOO,
    "reinforce_pp": REINFORCE_PP,
}
