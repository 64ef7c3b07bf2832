"""What happens when actors are lost, and what a checkpoint holds.

An iteration is a transaction. All its randomness comes from (seed, step), so trying it again from the same state gives
the same bits, whoever computes them. Whatever dies, the way back is one and the same:

1. who is gone is replaced (a hang or a late answer is first made a death, see cluster.health);
2. if learners were lost, or an update was under way, all learners go back to the newest checkpoint, and the driver's
   own state with them: prompts, KL coefficient, metrics file. Learners that live leave their broken group and join the
   new one in the same process, unless they wait for who is gone and do not hear of it: they are replaced too;
3. the wire of the weight sync is laid anew and every generator gets the learners' weights: until then a new one has no
   version, and is never asked for tokens;
4. the iteration is tried again; shards that were finished before are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from typing import Any

from ray.exceptions import ObjectLostError

from rlhf_ray.actors.learner_role import LearnerRole
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.group import IO, Group, named, wait
from rlhf_ray.cluster.health import LOST, Member
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.progress import console
from rlhf_ray.models.shards import SavedFile, shard_name
from rlhf_ray.train.checkpoint import Checkpoint, Checkpoints
from rlhf_ray.train.roles import learner_ranks


class Saver:
    """Checkpoints of learners: each is written, and made the newest one, while the run goes on."""

    def __init__(self, checkpoints: Checkpoints, learners: list[Group]):
        self.checkpoints, self.learners = checkpoints, learners
        self.saved = 0  # the newest step that is saved, or being written
        self._pool = ThreadPoolExecutor(1, "saver")
        self._writing: Future[None] | None = None

    def save(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Copy the learners' state now, write it in the background; the one before is finished first."""
        self.finish()
        directory = str(self.checkpoints.begin(step))
        wait([ref for g in self.learners for ref in g.start(LearnerRole.snapshot, directory)],
             self.learners[0].timeout_s, "checkpoint: copying the learners' state")
        refs = [ref for g in self.learners for ref in g.start(LearnerRole.write, directory, concurrency_group=IO)]
        self._writing, self.saved = self._pool.submit(self._commit, step, refs, state, metrics), step

    def _commit(self, step: int, refs: list[Any], state: dict[str, Any], metrics: dict[str, float]) -> None:
        try:
            written: list[list[SavedFile]] = wait(refs, self.learners[0].timeout_s, f"checkpoint {step}: writing")
            files = [file for some in written for file in some]
            shards = {shard_name(g.role, rank, len(g)) for g in self.learners for rank in range(len(g))}
            if missing := shards - {file.name for file in files}:
                raise RuntimeError(f"checkpoint {step} lacks {', '.join(sorted(missing))}: nobody wrote that")
            self.checkpoints.commit(step, files, state, metrics)
        except BaseException:
            self.checkpoints.abandon(step)
            raise

    def poll(self) -> None:
        """Raise what went wrong with it, if that is known by now."""
        if self._writing and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until what is being written is the newest checkpoint."""
        if self._writing:
            wait_for([self._writing])  # who is interrupted here can wait again
            writing, self._writing = self._writing, None
            if writing.exception():
                self.saved = 0
            writing.result()

    def give_up(self) -> None:
        """Finish if the writers live, else drop it."""
        with suppress(*LOST, TimeoutError):
            self.finish()

    def last(self, save: Callable[[], None]) -> None:
        """Save and finish, for a run that is cut off. What cuts it off is to be told, not what goes wrong here."""
        try:
            save()
            self.finish()
        except Exception as error:
            console.print(f"no further checkpoint could be written: {error}", markup=False)


class Recovery:
    """Replaces lost actors and brings the learners back to a state that they all share.

    connect: lays the wire from the policy to the generators; roll_back: takes over the driver's state of a checkpoint
    (None: that of the start).
    """

    def __init__(self, cast: Cast, learners: list[Group], saver: Saver, attempts: int,
                 connect: Callable[[], None], roll_back: Callable[[Checkpoint | None], None]):
        self.cast, self.learners, self.saver, self.attempts = cast, learners, saver, attempts
        self._connect, self._roll_back = connect, roll_back
        self.updating = False  # the learners are between two states that driver and learners share
        self.restarts: Counter[str] = Counter()  # by role, in the whole run
        self._tries = self._furthest = 0
        self._broken: set[str] = set()  # learner groups that lost a rank

    def succeeded(self, step: int) -> None:
        """A step is done: if none got so far before, the count of attempts begins anew."""
        if step > self._furthest:
            self._tries, self._furthest = 0, step

    @property
    def settled(self) -> bool:
        """Whether learners and driver share a state, which may be saved."""
        return not (self.updating or self._broken)

    def heal(self, error: Exception, updated: bool = False) -> bool:
        """All roles stand again, or this raises: `error` if no loss explains it, or the attempts are used up.

        updated: the learners are done with their update, so that they need not go back unless one was lost. Returns
        whether they went back.
        """
        back, rebuilding = self.updating and not updated, False
        while True:
            gone = self._explain(error, rebuilding)
            if isinstance(error, ObjectLostError):  # a rank that misses an object leaves the others in a collective
                self._broken |= {group.role for group in self.learners if len(group) > 1}
                back = back or bool(self._broken)
            back = back or any(member.role == group.role for member in gone for group in self.learners)
            try:
                self._rebuild(gone, back)
                return back
            except Exception as another:
                error, rebuilding = another, True

    def _explain(self, error: Exception, rebuilding: bool) -> list[Member]:
        """Who is gone. What goes wrong while rebuilding (a port that is taken) may go well the next time."""
        if isinstance(error, UserError):
            raise error
        gone = self.cast.lost(error)
        if not gone and not isinstance(error, LOST) and not rebuilding:
            raise error
        self._tries += 1
        if self._tries > self.attempts:
            raise error
        console.print(f"lost: {named(gone, error)}; trying again ({self._tries} of cluster.attempts={self.attempts})",
                      markup=False)
        return gone

    def _rebuild(self, gone: list[Member], back: bool) -> None:
        learning = {group.role for group in self.learners}
        self.saver.give_up()
        self._broken |= learning & {member.role for member in gone}
        for member in (*gone, *self.cast.stuck(self._broken)):
            self.restarts[member.role] += 1
            self.cast.replace(member, set_up=member.role not in learning)
        checkpoint = self.saver.checkpoints.newest() if back else None
        for group in self.learners:
            if group.role in self._broken or (back and checkpoint is None):
                self.rejoin(group)
        self.cast.ready()
        if back:
            if checkpoint:
                self.restore(checkpoint)
            self._roll_back(checkpoint)
            self._broken.clear()
            self.updating = False
        self._connect()

    def rejoin(self, group: Group) -> None:
        """Every rank, living or new, leaves its old group and starts from the first weights in a new one."""
        ranks = learner_ranks(self.cast, group.role, len(group))
        self.cast.set_up_again(group, [(rank, *args[1:]) for rank, args in
                                       zip(ranks, self.cast.args(group), strict=True)])

    def restore(self, checkpoint: Checkpoint) -> None:
        """All learners take over their part of a checkpoint."""
        wait([ref for g in self.learners for ref in g.start(LearnerRole.restore, str(checkpoint.directory))],
             self.learners[0].timeout_s, f"restoring {checkpoint.directory}")
        self.saver.saved = checkpoint.step
