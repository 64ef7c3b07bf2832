"""PPO with a critic, as InstructGPT uses it (Schulman et al. 2017, eq. 7; Ouyang et al. 2022, eq. 2).

    r_t = -beta * KL_t, + score on the last token        A = GAE(r, V), whitened over the batch
    loss = -mean over tokens of min(ratio_t * A_t, clip(ratio_t) * A_t)

The critic starts from the reward model. PPO-ptx is this with the pre-training loss mixed into every optimizer
step: algorithm.ptx, which any algorithm can have. Edge case: a response of one token has A = r - V.
"""

from rlhf_ray.core.advantages import gae
from rlhf_ray.core.algorithms.spec import Algorithm

PPO = Algorithm(advantages=gae, critic=True, whiten="option")
