"""What happens when an alarm rings: a line on the console and in alarms.jsonl, a pause, or the end of the run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_ray import disk, storage
from rlhf_ray.config.schema import AlarmsConfig
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.alarms import Alarm, AlarmMonitor
from rlhf_ray.metrics.progress import console

PAUSED = "PAUSED"


class Watch:
    """`check` and then `act` are called once per iteration; `act` again, if an actor was lost while it did.

    `save` keeps the policy before the run is stopped. `<directory>/alarms.jsonl` gets a line for each alarm. A pause
    lasts until the file `<directory>/PAUSED`, which says why, is removed; actors and weights stay as they are. Whoever
    gives the command of the run again lets it go on, too.
    """

    def __init__(self, cfg: AlarmsConfig, directory: Path, save: Callable[[], Any]):
        self.monitor, self.directory, self._save = AlarmMonitor(cfg), directory, save
        self._file = directory / "alarms.jsonl"
        self._ringing: list[Alarm] = []  # nothing has been done about them yet

    def check(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Report the alarms of this iteration."""
        self._ringing = self.monitor.check(iteration, values)
        for alarm in self._ringing:
            console.print(f"ALARM {alarm.name}: {alarm.message}", markup=False, style="bold red", soft_wrap=True)
            with disk.writing(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(alarm)) + "\n")

    def act(self, iteration: int) -> None:
        """Stop (by a UserError), pause, or go on, as the alarms of this iteration want it."""
        alarms = [a for a in self._ringing if a.iteration == iteration]  # a run that went back is no longer there
        stopping = [a for a in alarms if a.action == "stop"]
        if stopping:
            self._save()
            raise UserError(f"stopped in iteration {iteration} by alarms.{stopping[0].name}, the policy of this "
                            f"iteration is saved: {stopping[0].message}")
        if any(a.action == "pause" for a in alarms):
            self._pause(iteration, [a.message for a in alarms if a.action == "pause"])
        self._ringing = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: JSON-able."""
        written = self._file.stat().st_size if self._file.exists() else 0
        return {"monitor": self.monitor.state_dict(), "position": written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: what was written later is written again."""
        self.monitor.load_state_dict(state["monitor"])
        if self._file.exists():
            os.truncate(self._file, min(state["position"], self._file.stat().st_size))  # never longer, by zeros

    def _pause(self, iteration: int, messages: list[str]) -> None:
        flag = self.directory / PAUSED
        disk.write_text(flag, f"iteration {iteration}\n" + "\n".join(messages) + "\n")
        storage.publish(self.directory, storage.of_driver)
        console.print(f"paused after iteration {iteration}: remove {flag} to go on, or end the run with Ctrl-C",
                      markup=False)
        while flag.exists():
            time.sleep(0.5)
        storage.withdraw(flag)
        console.print("going on")
