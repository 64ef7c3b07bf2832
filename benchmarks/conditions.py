"""What a benchmark's numbers were taken under."""

from __future__ import annotations

import json
import os
import re
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from rlhf_ray.versions import installed


def conditions() -> dict[str, Any]:
    """Date, processor, cores, GPU and versions: JSON-able."""
    import torch

    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {"date": str(date.today()), "cpu": model[1] if model else "unknown", "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "versions": installed()}


def keep(name: str, overrides: list[str], found: dict[str, Any]) -> None:
    """Write what a benchmark found, with conditions, into its file for this kind of machine; what other overrides gave
    stays there."""
    import torch

    file = Path(__file__).parent / "results" / f"{name}{'_gpu' if torch.cuda.is_available() else ''}.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[" ".join(overrides) or "defaults"] = {**conditions(), **found}
    file.write_text(json.dumps(kept, indent=1) + "\n")


def spread(values: list[float]) -> dict[str, float]:
    """How a measurement that was repeated is told."""
    return {"median": median(values), "min": min(values), "max": max(values)}
