"""What happens when an alarm rings: a line on the console and in alarms.jsonl, a pause, or the end of the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_ray.config.schema import AlarmsConfig
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.alarms import AlarmMonitor
from rlhf_ray.metrics.progress import console

PAUSED = "PAUSED"


class Watch:
    """Called once per iteration with what was recorded. `save` keeps the policy before the run is stopped.

    `<directory>/alarms.jsonl` gets a line for each alarm. A pause lasts until the file `<directory>/PAUSED`, which
    says why, is removed; actors and weights stay as they are.
    """

    def __init__(self, cfg: AlarmsConfig, directory: Path, save: Callable[[], Any]):
        self.monitor, self.directory, self._save = AlarmMonitor(cfg), directory, save

    def __call__(self, iteration: int, values: Mapping[str, Any]) -> None:
        alarms = self.monitor.check(iteration, values)
        for alarm in alarms:
            console.print(f"ALARM {alarm.name}: {alarm.message}", markup=False, style="bold red", soft_wrap=True)
            with (self.directory / "alarms.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(alarm)) + "\n")
        stopping = [a for a in alarms if a.action == "stop"]
        if stopping:
            self._save()
            raise UserError(f"stopped in iteration {iteration} by alarms.{stopping[0].name}, the policy of this "
                            f"iteration is saved: {stopping[0].message}")
        if any(a.action == "pause" for a in alarms):
            self._pause(iteration, [a.message for a in alarms if a.action == "pause"])

    def _pause(self, iteration: int, messages: list[str]) -> None:
        flag = self.directory / PAUSED
        flag.write_text(f"iteration {iteration}\n" + "\n".join(messages) + "\n", encoding="utf-8")
        console.print(f"paused after iteration {iteration}: remove {flag} to go on, or end the run with Ctrl-C",
                      markup=False)
        while flag.exists():
            time.sleep(0.5)
        console.print("going on")
