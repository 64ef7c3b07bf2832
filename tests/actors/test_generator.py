"""Every rollout samples from a random stream of its own."""

from rlhf_ray.actors.generator import sample_seed


def test_no_two_samples_share_a_seed() -> None:
    """Nor do neighbours (step 1, position 2) and (step 2, position 1)."""
    seeds = [sample_seed(0, step, position) for step in range(50) for position in range(100)]
    assert len(set(seeds)) == 5000
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_seed_is_a_matter_of_run_step_and_position() -> None:
    assert sample_seed(3, 5, 7) == sample_seed(3, 5, 7)
    assert isinstance(sample_seed(3, 5, 7), int)
    assert len({sample_seed(*at) for at in ((3, 5, 7), (5, 3, 7), (3, 7, 5), (4, 5, 7), (7, 5, 3))}) == 5
