"""The gate after the first weight sync: do trainer and engines agree about the same tokens?

If they do not, every ratio and every KL of the run would be wrong, and the curves would still look plausible.
"""

from __future__ import annotations

import math
from typing import Any

from rlhf_ray.actors.generator import sample_seed
from rlhf_ray.actors.policy import PolicyLearner
from rlhf_ray.cluster.group import Group
from rlhf_ray.core.types import Sample
from rlhf_ray.errors import UserError
from rlhf_ray.train.rollout import RolloutWorkers

PROMPTS = 8  # the first of the prompt set: the same for every run on the same data
_CAUSES = """\
  1. weights that did not arrive: a tied or packed output head that kept its old values, a parameter that the engine \
names otherwise (a new architecture or another vLLM?)
  2. temperature or other sampling settings in one of the passes only (a generation_config.json beside the model?)
  3. different precision: model.dtype against what the engine runs in, or a bfloat16 model held to the threshold of \
float32; bfloat16 rounds by 0.01 to 0.03
  4. another attention: model.attn_implementation, sliding windows, rotary scaling, positions in packed rows
  5. an engine that computes with cached keys and values of older weights"""


def check_first_sync(
    workers: RolloutWorkers, policy: Group, num_prompts: int, version: int, seed: int, limit: float
) -> float:
    """Mean |trainer - engine| log-probability, nats per token, on responses to fixed prompts: that of the worst engine.

    Raises UserError with the measured gap and the usual causes if it is above `limit` or not a number.
    """
    samples = [Sample(i, i, sample_seed(seed, 0, i)) for i in range(min(PROMPTS, num_prompts))]
    gaps = [_gap(policy, shards) for shards in workers.probe(samples, version)]
    worst = max(gaps, key=lambda gap: math.inf if math.isnan(gap) else gap)
    if not worst <= limit:
        each = ", ".join(f"generator {i}: {gap:.2g}" for i, gap in enumerate(gaps))
        raise UserError(
            f"after the first weight sync trainer and engine disagree by {worst:.2g} nats per token on the same tokens "
            f"({each}); weight_sync.max_mismatch={limit:g} allows less. Check, in this order:\n{_CAUSES}")
    return worst


def _gap(policy: Group, shards: list[Any]) -> float:
    shares = [(shards[rank::len(policy)],) for rank in range(len(policy))]
    scored = [old for some in policy.call_each(PolicyLearner.score, shares) for old in some]
    tokens = sum(old.tokens for old in scored)
    return sum(old.gap for old in scored) / tokens if tokens else math.nan
