"""`rlhf-ray scale`: more or fewer generators for a ppo stage that is under way."""

from __future__ import annotations

import time
from pathlib import Path

import yaml

from rlhf_ray.config.schema import Config
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.overview import RunFiles
from rlhf_ray.metrics.progress import console
from rlhf_ray.train.fleet import WANTED


def run(cfg: Config) -> None:
    """Leave the wish where the run's driver looks for it before each weight sync."""
    wanted, root = cfg.scale.generators, Path(cfg.output_dir)
    if wanted is None:
        raise UserError("scale.generators is missing: how many generators shall there be? scale.generators=N")
    overview = RunFiles(root).read(time.time())
    if not any(stage.name == "ppo" and stage.state == "running" for stage in overview.stages):
        raise UserError(f"output_dir={root}: no ppo stage is under way there; for one that is still to begin, set "
                        f"roles.generator.replicas={wanted}")
    if yaml.safe_load((root / "ppo/config.yaml").read_text())["cluster"]["placement"] == "colocated":
        raise UserError(f"output_dir={root}: with cluster.placement=colocated every generator shares the device of a "
                        "policy rank, and their number stays as it is")
    file = root / "ppo" / WANTED
    fresh = file.with_name(file.name + ".tmp")
    fresh.write_text(f"{wanted}\n")
    fresh.replace(file)
    console.print(f"generators wanted: {wanted}; they join or leave at a weight sync, once they are up")
