"""Stage `dpo`: the policy from ranked responses directly, without a reward model or sampling (Rafailov et al. 2023)."""

from functools import partial

import numpy as np

from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.schema import Config
from rlhf_ray.data.formats import read_comparisons
from rlhf_ray.data.sources import load_task_data
from rlhf_ray.metrics.progress import console
from rlhf_ray.models.hub import load_tokenizer
from rlhf_ray.stages.common import Paths, resumed, stage
from rlhf_ray.stages.rm import encode, held_out_accuracy, prompt_keys, scores_of
from rlhf_ray.train.supervised import Task, split_units, supervised


def run(cfg: Config) -> None:
    with stage(cfg, "dpo") as record:
        paths, task_data = Paths(cfg), load_task_data(cfg.data)
        for maker in ("sft", "compare"):
            paths.require(maker)
        comparisons = read_comparisons(str(paths.comparisons))
        data, kept = encode(comparisons, [], cfg, load_tokenizer(str(paths.sft)))
        train, val = split_units(len(kept), cfg.dpo.val_fraction, cfg.seed, prompt_keys(kept))
        task = Task(
            name="dpo", objective="dpo", path=str(paths.sft), data=data, train=train, val=val,
            weights=np.bincount(data.groups, weights=data.lengths), epochs=cfg.dpo.epochs,
            batch_size=cfg.dpo.prompts_per_batch, optimizer=cfg.dpo.optimizer, dpo=cfg.dpo,
        )
        resume = partial(resumed, cfg, record, {"start": task.path, "comparisons": paths.comparisons})
        with session(cfg), supervised(cfg, task, resume) as trained:
            trained.save_model(paths.dpo, cfg.model.dtype)
            rewards = scores_of(trained, val)
            accuracy, interval, pairs = held_out_accuracy(data, val, rewards, cfg.seed, "dpo.val_fraction")
            record.add(
                val_accuracy=accuracy, ci95=list(interval), val_loss=trained.val["loss"],
                val_margin=trained.val["margin_sum"] / pairs, train_loss=trained.last["loss"], val_prompts=len(val),
                val_pairs=pairs, comparisons=len(kept), dropped=len(comparisons) - len(kept), actors=trained.actors,
                data=task_data.fingerprint(),
            )
            console.print(f"the policy's implicit reward orders {accuracy:.1%} [{interval[0]:.1%}, {interval[1]:.1%}] "
                          f"of held-out pairs as the labeler did; loss {trained.val['loss']:.3f} (untrained: "
                          f"{np.log(2):.3f} without ties)")
