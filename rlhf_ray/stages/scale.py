"""`rlhf-ray scale`: more or fewer generators for a ppo stage that is under way."""

from __future__ import annotations

import time

import yaml

from rlhf_ray import disk
from rlhf_ray.config.schema import Config
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.overview import RunFiles
from rlhf_ray.metrics.progress import console
from rlhf_ray.storage import local_root, url_of
from rlhf_ray.train.fleet import WANTED


def run(cfg: Config) -> None:
    """Leave the wish where the run's driver looks for it before each weight sync."""
    wanted, root = cfg.scale.generators, local_root(cfg.output_dir)
    if wanted is None:
        raise UserError("scale.generators is missing: how many generators shall there be? scale.generators=N")
    overview = RunFiles(root).read(time.time())
    if not any(stage.name == "ppo" and stage.state == "running" for stage in overview.stages):
        where = "on this machine, or the driver is on another" if url_of(root) else "there"
        raise UserError(f"output_dir={cfg.output_dir}: no ppo stage is under way {where}; for one that is still to "
                        f"begin, set roles.generator.replicas={wanted}")
    if yaml.safe_load((root / "ppo/config.yaml").read_text())["cluster"]["placement"] == "colocated":
        raise UserError(f"output_dir={cfg.output_dir}: with cluster.placement=colocated every generator shares the "
                        "device of a policy rank, and their number stays as it is")
    disk.write_text(root / "ppo" / WANTED, f"{wanted}\n")
    console.print(f"generators wanted: {wanted}; they join or leave at a weight sync, once they are up")
