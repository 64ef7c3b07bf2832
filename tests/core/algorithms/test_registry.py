"""What can be configured is what there is."""

from dataclasses import fields

import pytest

from rlhf_ray.config.checks import GROUP_ALGORITHMS, validate
from rlhf_ray.config.load import compose, groups
from rlhf_ray.config.schema import AlgorithmConfig
from rlhf_ray.core.algorithms.registry import ALGORITHMS
from rlhf_ray.core.kl import SOUND
from rlhf_ray.errors import UserError

RECIPES = groups()["algorithm"]


def test_the_names_that_may_be_configured_are_those_of_the_registry():
    (name,) = (f for f in fields(AlgorithmConfig) if f.name == "name")
    assert name.metadata["choices"] == tuple(ALGORITHMS)


def test_an_algorithm_has_advantages_of_tokens_or_of_groups():
    assert all((a.advantages is None) != (a.group_advantages is None) for a in ALGORITHMS.values())
    assert {name for name, a in ALGORITHMS.items() if a.group_advantages} == set(GROUP_ALGORITHMS)


def test_what_the_checks_say_of_critics_holds():
    """`ppo.critic_warmup_iterations` is refused for every algorithm but ppo: it alone has a critic."""
    assert {name for name, a in ALGORITHMS.items() if a.critic} == {"ppo"}


def test_every_algorithm_has_a_recipe_of_its_name():
    assert set(ALGORITHMS) <= set(RECIPES)
    assert all(compose([f"algorithm={name}"]).algorithm.name == name for name in ALGORITHMS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_compose_to_sound_configurations(recipe: str):
    cfg = compose([f"algorithm={recipe}"])
    validate(cfg, "ppo")
    assert cfg.algorithm.kl_estimator in SOUND[cfg.algorithm.kl_in]
    group_size = cfg.rollout.samples_per_prompt
    assert (group_size > 1) == (ALGORITHMS[cfg.algorithm.name].group_advantages is not None)
    assert cfg.rollout.batch_size % group_size == 0


@pytest.mark.parametrize("name", sorted(GROUP_ALGORITHMS))
def test_a_group_of_one_is_refused_before_the_start(name: str):
    with pytest.raises(UserError, match=r"rollout\.samples_per_prompt=1"):
        validate(compose([f"algorithm={name}", "rollout.samples_per_prompt=1"]), "ppo")


@pytest.mark.parametrize(("where", "estimator"), [("reward", "k2"), ("reward", "k3"), ("loss", "k1")])
def test_an_unsound_estimator_is_refused_before_the_start(where: str, estimator: str):
    with pytest.raises(UserError, match=f"kl_estimator={estimator} with algorithm.kl_in={where}"):
        validate(compose([f"algorithm.kl_in={where}", f"algorithm.kl_estimator={estimator}"]), "ppo")
