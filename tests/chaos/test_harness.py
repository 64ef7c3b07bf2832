"""The long form's faults leave out no actor and no phase."""

from collections import Counter
from signal import SIGKILL, SIGSTOP

from chaos.harness import PHASES, seeded

ACTORS = [("generator", 0), ("generator", 1), ("policy", 0)]


def test_every_actor_is_struck_in_every_phase_and_one_in_each_iteration() -> None:
    faults = seeded(25, ACTORS, seed=0)
    assert [f.step for f in faults] == list(range(1, 26))
    struck = Counter((f.phase, f.role, f.index) for f in faults[:21])
    assert struck == Counter((phase, *actor) for phase in PHASES for actor in ACTORS)  # 7 phases, 3 actors: once each
    assert [f.phase for f in faults] != sorted(f.phase for f in faults)
    assert len({f.phase for f in seeded(5, ACTORS, seed=0)}) > 1


def test_one_in_ten_is_a_hang() -> None:
    """Of 1000: 100, give or take three standard deviations of 9.5."""
    signals = Counter(f.signal for f in seeded(1000, ACTORS, seed=0))
    assert signals.keys() == {SIGKILL, SIGSTOP} and 71 < signals[SIGSTOP] < 129


def test_the_seed_decides() -> None:
    assert seeded(30, ACTORS, seed=0) == seeded(30, ACTORS, seed=0) != seeded(30, ACTORS, seed=1)
