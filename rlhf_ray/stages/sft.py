"""Stage `sft`: supervised fine-tuning on demonstrations, loss on response tokens only (InstructGPT, step 1)."""

from functools import partial

import numpy as np

from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.schema import Config
from rlhf_ray.core.types import TokenDataset
from rlhf_ray.data.formats import Demonstration
from rlhf_ray.data.sources import load_task_data
from rlhf_ray.data.templates import encode_prompt, encode_response
from rlhf_ray.errors import UserError
from rlhf_ray.metrics.progress import console
from rlhf_ray.models.hub import load_tokenizer
from rlhf_ray.stages.common import Paths, resumed, stage
from rlhf_ray.train.supervised import Task, split_units, supervised


def encode(demonstrations: list[Demonstration], cfg: Config, tokenizer: object) -> tuple[TokenDataset, int]:
    """Demonstrations as token ids with the response (and its end) in the loss. Also how many were too long."""
    ids, masks, dropped = [], [], 0
    for d in demonstrations:
        prompt = encode_prompt(d.prompt, cfg.data.template, tokenizer)
        response = encode_response(d.response, tokenizer)
        if len(prompt) > cfg.data.max_prompt_tokens or len(prompt) + len(response) > cfg.model.max_length:
            dropped += 1
            continue
        ids.append(np.array(prompt + response, dtype=np.int32))
        masks.append(np.arange(len(ids[-1])) >= len(prompt))
    if len(ids) < 2:
        raise UserError(f"{len(ids)} of {len(demonstrations)} demonstrations fit data.max_prompt_tokens="
                        f"{cfg.data.max_prompt_tokens} and model.max_length={cfg.model.max_length}: raise these")
    lengths = np.array([len(x) for x in ids], dtype=np.int32)
    return TokenDataset(np.concatenate(ids), lengths, np.concatenate(masks)), dropped


def run(cfg: Config) -> None:
    with stage(cfg, "sft") as record:
        paths, task_data = Paths(cfg), load_task_data(cfg.data)
        tokenizer = load_tokenizer(paths.start)
        demonstrations = task_data.demonstrations()[: cfg.sft.max_examples]
        data, dropped = encode(demonstrations, cfg, tokenizer)
        console.print(f"{len(data.lengths)} demonstrations, {int(data.in_loss.sum())} response tokens"
                      + (f"; {dropped} too long, left out" if dropped else ""))
        train, val = split_units(len(data.lengths), cfg.sft.val_fraction, cfg.seed)
        task = Task(
            name="sft", objective="lm", path=paths.start, data=data, train=train, val=val, weights=data.lengths,
            epochs=cfg.sft.epochs, batch_size=cfg.sft.batch_size, optimizer=cfg.sft.optimizer, dropout=cfg.sft.dropout,
        )
        resume = partial(resumed, cfg, record, {"start": task.path})
        with session(cfg), supervised(cfg, task, resume) as trained:
            trained.save_model(paths.sft, cfg.model.dtype)
            record.add(
                val_loss=trained.val["loss"], demonstrations=len(data.lengths), dropped=dropped,
                tokens=int(data.in_loss.sum()), actors=trained.actors, data=task_data.fingerprint(),
            )
