"""The generators of a run, which may come and go while it goes on.

`rlhf-ray scale` writes how many there shall be beside the stage's files; the driver reads it before each weight sync.
Who is new starts in the background, whenever there is room for it, and joins at the sync after it has come up; who is
to leave leaves there too. One that died is brought back in the same way: as long as another lives, nobody waits for it.

Exactness. The samples of a step are cut into as many shares as generators are wanted, not as many as are there. So a
loss changes no bit of the run; a change of the number does, for shares are packed and summed one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_ray.cluster.cast import Cast
from rlhf_ray.metrics.progress import console

WANTED = "generators"  # the file in the stage's directory
ROLE = "generator"


class Fleet:
    """wanted: how many generators there shall be."""

    def __init__(self, cast: Cast, wanted: int, directory: Path):
        self.cast, self.wanted, self._file = cast, wanted, directory / WANTED
        self._failures = 0  # of those who came up, in a row

    def gather(self) -> bool:
        """Let join who has come up, and go who is not wanted any more. Returns whether the group is another now.

        Never takes the last one that works.
        """
        before = list(self.cast.group(ROLE).actors)
        wish = self._wish()
        if wish != self.wanted:
            console.print(f"generators wanted: {wish} instead of {self.wanted}")
            self.wanted, self._failures = wish, 0
        if joined := self.cast.enlist(ROLE):
            self._failures = 0
            console.print(f"joined: {', '.join(f'{ROLE}-{i}' for i in joined)}")
        self._bring_back()
        seats = self.cast.seats(ROLE)
        for i in sorted(seats, key=lambda i: (seats[i], -i))[: max(0, len(seats) - self.wanted)]:
            if not seats[i] or len(self.cast.group(ROLE)) > 1:
                self.cast.dismiss(ROLE, i)
                console.print(f"left: {ROLE}-{i}")
        if self._failures <= self.cast.cfg.attempts:
            free = (i for i in range(self.wanted + len(seats)) if i not in seats)
            for _ in range(self.wanted - len(seats)):
                self.cast.recruit(ROLE, next(free))
        return self.cast.group(ROLE).actors != before

    def _bring_back(self) -> None:
        for member in self.cast.fallen(ROLE):
            self._failures += 1
            console.print(f"{ROLE}-{member.index} failed while it came up: {(member.words.splitlines() or [''])[-1]}",
                          markup=False)
            if self._failures <= self.cast.cfg.attempts:
                self.cast.replace(member)
            else:
                self.cast.dismiss(ROLE, member.index)
                console.print(f"going on with {len(self.cast.group(ROLE))}; `rlhf-ray scale` asks for more again")

    def _wish(self) -> int:
        try:
            return max(1, int(self._file.read_text()))
        except FileNotFoundError:
            return self.wanted
        except (OSError, ValueError) as error:
            console.print(f"{self._file} is unreadable, nothing changes: {error}", markup=False)
            return self.wanted

    def state_dict(self) -> dict[str, Any]:
        return {"wanted": self.wanted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.wanted = state["wanted"]
