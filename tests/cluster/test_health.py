"""Signs of life: who is gone, who hangs, who is given time."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from rlhf_ray.cluster import health as module
from rlhf_ray.cluster.health import Health, Member, Pulse

WHO = {"node": "10.0.0.3", "node_id": "n1", "pid": 7, "logs": ("out", "err"), "name": "passed over"}
ALIVE = Pulse(3 * 2**30, 20, 4)


class Actor:
    """Answers questions from `answers`: an exception is raised; None: nothing comes. asked: which questions."""

    def __init__(self, *answers: Any):
        self.answers, self.asked = list(answers), list[str]()

    def __getattr__(self, method: str) -> Any:
        def remote() -> SimpleNamespace:
            self.asked.append(method)
            return Ref(answer=self.answers.pop(0) if self.answers else None)

        return SimpleNamespace(options=lambda concurrency_group: SimpleNamespace(remote=remote))


class Ref(SimpleNamespace):
    __hash__ = object.__hash__


class Ray:
    """What Health needs of Ray, and a clock that stands still."""

    def __init__(self) -> None:
        self.now, self.killed = 100.0, list[Actor]()

    def wait(self, refs: list[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        return [r for r in refs if r.answer is not None], [r for r in refs if r.answer is None]

    def get(self, ref: Ref, timeout: float) -> Any:
        if isinstance(ref.answer, Exception):
            raise ref.answer
        return ref.answer

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ray]:
    fake = Ray()
    monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: fake.now, time=lambda: 1e9 + fake.now))
    yield fake


def watching(*actors: Actor, started: bool = True) -> tuple[Health, list[Member]]:
    """Every 5 s, with a deadline of 60 s; actors of the roles r0, r1, ..."""
    health = Health(5, 60)
    members = [Member(f"r{i}", 0, f"r{i}-0", actor) for i, actor in enumerate(actors)]
    for member in members:
        health.watch(member)
    if started:
        health.started(list(health.members))
    return health, members


def one_round(health: Health) -> None:
    """What the thread does each time that it wakes up."""
    wakes = iter([False, True])
    health._stop = SimpleNamespace(wait=lambda seconds: next(wakes))
    health._run()


def test_first_it_says_who_it_is_and_then_how_it_is(ray: Ray) -> None:
    health, (member,) = watching(Actor(WHO, ALIVE))
    assert health.look() == [] and health.memory_gib() == {}
    assert (member.node, member.node_id, member.pid, member.logs) == ("10.0.0.3", "n1", 7, ("out", "err"))
    assert health.look() == [] and list(member.pulses) == [(1e9 + 100, ALIVE)]
    assert health.memory_gib() == {"r0-0": 3.0}
    assert member.actor.asked == ["describe", "pulse"]


def test_a_death_is_noted_once_with_what_ray_says_and_is_not_asked_again(ray: Ray) -> None:
    health, (dead, living) = watching(Actor(ActorDiedError()), Actor(WHO, ALIVE))
    assert health.look() == [dead] and health.look() == [dead]
    assert (dead.gone, dead.words, dead.actor.asked) == ("died", str(ActorDiedError()), ["describe"])
    assert not living.gone and ray.killed == []


def test_who_has_not_answered_is_not_asked_twice(ray: Ray) -> None:
    health, (member,) = watching(Actor(None))
    assert health.look() == health.look() == []
    assert member.actor.asked == ["describe"]


def test_silence_beyond_the_deadline_is_ended_and_others_live_on(ray: Ray) -> None:
    """Asked at 100; at 160 the 60 s are not over, at 161 they are."""
    health, (silent, living) = watching(Actor(None), Actor(WHO, ALIVE, ALIVE))
    for ray.now in (100, 160):
        one_round(health)
        assert ray.killed == []
    ray.now = 161
    one_round(health)
    assert ray.killed == [silent.actor]
    assert (silent.gone, silent.words) == ("hung", "no sign of life for 60 s")
    assert not living.gone and health.look() == [silent]
    one_round(health)
    assert ray.killed == [silent.actor]  # once


def test_before_it_has_come_up_it_may_be_silent(ray: Ray) -> None:
    """Asked at 100, up at 1000: from there its 60 s count."""
    health, (member,) = watching(Actor(None), started=False)
    for ray.now in (100, 1000):
        one_round(health)
    health.started(list(health.members))
    for ray.now, killed in ((1060, []), (1061, [member.actor])):
        one_round(health)
        assert ray.killed == killed


def test_one_that_comes_later_has_a_deadline_of_its_own(ray: Ray) -> None:
    """`started` at 100 and, with a new actor, at 500: the first one's time does not begin anew."""
    health, (first,) = watching(Actor())
    ray.now = 500
    new = Member("r1", 0, "r1-0", Actor())
    health.watch(new)
    health.started(list(health.members))
    assert (first.started_at, new.started_at) == (100, 500)


def test_what_was_killed_for_a_late_answer_stays_overdue_whatever_ray_says_later(ray: Ray) -> None:
    health, (member,) = watching(Actor(None))
    assert health.look() == []
    health.kill("r0-0", "overdue", "update did not answer within 9 s")
    health.kill("r0-0", "overdue", "again")
    health.kill("nobody", "overdue", "")
    member.asked.answer = ActorDiedError()
    assert health.look() == [member] and ray.killed == [member.actor]
    assert (member.gone, member.words) == ("overdue", "update did not answer within 9 s")


def test_an_answer_that_cannot_be_fetched_is_asked_for_again(ray: Ray) -> None:
    health, (member,) = watching(Actor(GetTimeoutError(), WHO))
    assert health.look() == [] and member.pid == 0
    assert health.look() == [] and member.pid == 7


def test_who_is_out_of_reach_is_asked_again_and_its_silence_counts_from_the_first_question(ray: Ray) -> None:
    """Asked at 100 and at 150, and each time Ray only says that it cannot be reached: at 161 its 60 s are over."""
    unreachable = ActorUnavailableError("connection reset", None)
    health, (member,) = watching(Actor(unreachable, unreachable, None))
    for ray.now in (100, 150):
        one_round(health)
        assert not member.gone
    ray.now = 161
    one_round(health)
    assert (member.gone, ray.killed) == ("hung", [member.actor])


def test_who_cannot_say_how_it_is_lives_all_the_same(ray: Ray) -> None:
    """`pulse` raised: no file descriptor was left to read its own memory."""
    failed = RayTaskError("pulse", "Traceback", OSError("too many open files"))
    health, (member,) = watching(Actor(WHO, failed, ALIVE))
    assert health.look() == health.look() == health.look() == []
    assert list(member.pulses) == [(1e9 + 100, ALIVE)] and ray.killed == []


def test_what_goes_wrong_in_one_round_does_not_end_the_watch(
    ray: Ray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    health, (member,) = watching(Actor(None))
    with monkeypatch.context() as patched:
        patched.setattr(ray, "wait", lambda *_, **__: 1 / 0)
        one_round(health)
    assert "ZeroDivisionError" in capsys.readouterr().out
    ray.now = 161
    one_round(health)
    assert ray.killed == [member.actor]


def test_of_many_those_who_have_not_been_asked_for_longest_are_asked(
    ray: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two in a round; the second of five never answers, and does not take a place of the others."""
    monkeypatch.setattr(module, "_IN_A_ROUND", 2)
    actors = [Actor(*([] if i == 1 else [WHO, *[ALIVE] * 9])) for i in range(5)]
    health, _ = watching(*actors)
    rounds = [(0, 1), (2, 3), (4, 0), (2, 3), (4, 0)]
    for asked in rounds:
        before = [len(a.asked) for a in actors]
        one_round(health)
        assert [i for i, a in enumerate(actors) if len(a.asked) > before[i]] == sorted(asked)
    health.look()
    assert [len(a.asked) for a in actors] == [4, 1, 3, 3, 3]  # whoever wants to know who is gone asks everybody


def test_who_is_forgotten_is_not_missed(ray: Ray) -> None:
    health, _ = watching(Actor(ActorDiedError()))
    health.forget("r0-0")
    health.forget("r0-0")
    assert health.look() == [] and health.memory_gib() == {}


def test_the_thread_ends_when_it_is_told_to(ray: Ray) -> None:
    health = Health(60, 60)
    health.stop()  # it never began
    health = Health(60, 60)
    health.start()
    health.stop()
    assert not health._thread.is_alive()
