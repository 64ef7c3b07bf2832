"""Stage `pretrain`: a base model from plain text."""

import math
from functools import partial
from pathlib import Path

import numpy as np

from rlhf_ray import storage
from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.schema import Config
from rlhf_ray.data.blocks import block_dataset, some_blocks, token_blocks
from rlhf_ray.data.sources import load_task_data
from rlhf_ray.models.hub import load_tokenizer
from rlhf_ray.models.tiny import save_untrained
from rlhf_ray.stages.common import Paths, StageRecord, resumed, stage
from rlhf_ray.train.supervised import Task, supervised


def run(cfg: Config) -> None:
    with stage(cfg, "pretrain") as record, session(cfg):
        train(cfg, record)


def train(cfg: Config, record: StageRecord) -> None:
    paths, task_data, p = Paths(cfg), load_task_data(cfg.data), cfg.pretrain
    texts = task_data.texts()
    start = paths.start_of_pretraining
    if p.init == "scratch":
        start = str(paths.stage("pretrain") / "untrained")
        save_untrained(p, cfg.model.max_length, texts, Path(start), cfg.seed)
        storage.publish(Path(start), exact=True)
        storage.settle()
    tokenizer = load_tokenizer(start)
    blocks = token_blocks(texts, tokenizer, p.block_length)
    held_out = token_blocks(task_data.eval_texts(), tokenizer, p.block_length)
    held_out = some_blocks(held_out, cfg.eval.loss_blocks, cfg.seed)
    task = Task(
        name="pretrain", objective="lm", path=start, data=block_dataset(np.concatenate([blocks, held_out])),
        train=np.arange(len(blocks)), val=np.arange(len(blocks), len(blocks) + len(held_out)),
        weights=np.full(len(blocks) + len(held_out), p.block_length), epochs=p.epochs, batch_size=p.batch_blocks,
        optimizer=p.optimizer, autocast=p.autocast,
    )
    resume = partial(resumed, cfg, record, {"start": task.path})
    with supervised(cfg, task, resume) as trained:
        loss = trained.val["loss"]
        trained.save_model(paths.base, p.save_dtype)
        record.add(
            held_out_loss=loss, held_out_perplexity=math.exp(loss), tokens=int(blocks.size), epochs=p.epochs,
            actors=trained.actors, data=task_data.fingerprint(),
        )
