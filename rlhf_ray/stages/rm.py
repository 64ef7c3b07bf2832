"""Stage `rm`: a reward model from ranked responses (InstructGPT, step 2, second half)."""

from functools import partial

import numpy as np

from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.schema import Config
from rlhf_ray.core.types import RankedDataset
from rlhf_ray.data.formats import Comparison, Demonstration, read_comparisons
from rlhf_ray.data.sources import load_task_data
from rlhf_ray.data.templates import encode_prompt, encode_response
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.statistics import cluster_interval
from rlhf_ray.metrics.progress import console
from rlhf_ray.models.hub import SCORE_SHIFT, load_tokenizer
from rlhf_ray.stages.common import Paths, resumed, stage
from rlhf_ray.train.supervised import SupervisedLearner, SupervisedTrainer, Task, split_units, supervised

SHIFT_DEMONSTRATIONS = 512  # enough for a mean; their scores become 0 on average


def encode(
    comparisons: list[Comparison], demonstrations: list[Demonstration], cfg: Config, tokenizer: object
) -> tuple[RankedDataset, list[Comparison]]:
    """Ranked responses, then the demonstrations (if any are given), each a group of its own.

    Returns the data, and the comparisons in it: groups 0, 1, ... are theirs, in order. A comparison with a response
    that is too long is left out.
    """
    ids: list[list[int]] = []
    ranks: list[int] = []
    groups: list[int] = []
    prompts: list[int] = []
    kept: list[Comparison] = []
    for c in comparisons:
        prompt = encode_prompt(c.prompt, cfg.data.template, tokenizer)
        responses = [prompt + encode_response(r, tokenizer) for r in c.responses]
        if max(len(r) for r in responses) > cfg.model.max_length:
            continue
        ids += responses
        ranks += c.ranks
        groups += [len(kept)] * len(responses)
        prompts += [len(prompt)] * len(responses)
        kept.append(c)
    if len(kept) < 2:
        raise UserError(f"{len(kept)} of {len(comparisons)} comparisons fit model.max_length={cfg.model.max_length}: "
                        "raise it, or give more comparisons")
    extra = len(kept)
    for d in demonstrations:
        prompt = encode_prompt(d.prompt, cfg.data.template, tokenizer)
        whole = prompt + encode_response(d.response, tokenizer)
        if len(whole) <= cfg.model.max_length:
            ids.append(whole)
            ranks.append(1)
            groups.append(extra)
            prompts.append(len(prompt))
            extra += 1
    if demonstrations and extra == len(kept):
        raise UserError(f"no demonstration fits model.max_length={cfg.model.max_length}, and the reward model's scores "
                        "are shifted by those of demonstrations: raise it")
    lengths = np.array([len(x) for x in ids], dtype=np.int32)
    data = RankedDataset(np.concatenate([np.array(x, dtype=np.int32) for x in ids]), lengths,
                         np.array(ranks, dtype=np.int32), np.array(groups, dtype=np.int32),
                         np.array(prompts, dtype=np.int32))
    return data, kept


def prompt_keys(comparisons: list[Comparison]) -> np.ndarray:
    """A number for each comparison, the same for comparisons of one prompt (by several labelers, say): int64 [N].

    What a prompt says makes it one, whatever metadata it carries.
    """
    numbers: dict[tuple[object, ...], int] = {}
    return np.array([numbers.setdefault((c.prompt.turns, c.prompt.input), len(numbers)) for c in comparisons])


def pair_counts(data: RankedDataset, groups: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per prompt: pairs that the scores [N] order as the labeler did (equal scores: half), and all untied pairs."""
    correct, total = [], []
    for group in groups:
        rows = np.flatnonzero(data.groups == group)
        better = data.ranks[rows][:, None] < data.ranks[rows][None, :]
        margin = (scores[rows][:, None] - scores[rows][None, :])[better]
        correct.append(float((margin > 0).sum() + 0.5 * (margin == 0).sum()))
        total.append(int(better.sum()))
    return np.array(correct), np.array(total)


def held_out_accuracy(
    data: RankedDataset, val: np.ndarray, scores: np.ndarray, seed: int, key: str
) -> tuple[float, tuple[float, float], int]:
    """How the scores [N] order the pairs of the prompts in `val`: share right, its 95% interval over prompts, pairs.

    Raises UserError, naming the key that holds more prompts out, if all responses tie.
    """
    correct, total = pair_counts(data, val, scores)
    judged = np.flatnonzero(total)  # a prompt whose responses all tie says nothing
    if not len(judged):
        raise UserError("no pair of the validation prompts has a winner: all their ranks are ties; give more "
                        f"comparisons or raise {key}")
    return (float(correct.sum() / total.sum()), cluster_interval(correct[judged], total[judged], seed=seed),
            int(total.sum()))


def scores_of(trained: SupervisedTrainer, units: np.ndarray) -> np.ndarray:
    """What the trained model scores the responses to the given prompts: float32 [N], 0 for the others."""
    scores = np.zeros(len(trained.task.data.lengths), dtype=np.float32)
    for rows, values in trained.persist(lambda: trained.dealt(SupervisedLearner.scores, units)):
        scores[rows] = values
    return scores


def run(cfg: Config) -> None:
    with stage(cfg, "rm") as record:
        paths, task_data = Paths(cfg), load_task_data(cfg.data)
        for maker in ("sft", "compare"):
            paths.require(maker)
        tokenizer = load_tokenizer(str(paths.sft))
        demonstrations = task_data.demonstrations()
        rng = np.random.default_rng((cfg.seed, 3))
        chosen = rng.permutation(len(demonstrations))[:SHIFT_DEMONSTRATIONS]
        anchors = [demonstrations[i] for i in chosen]
        comparisons = read_comparisons(str(paths.comparisons))
        data, kept = encode(comparisons, anchors, cfg, tokenizer)
        count = len(kept)
        train, val = split_units(count, cfg.rm.val_fraction, cfg.seed, prompt_keys(kept))
        weights = np.bincount(data.groups, weights=data.lengths)
        task = Task(
            name="rm", objective="ranking", path=str(paths.sft), data=data, train=train, val=val, weights=weights,
            epochs=cfg.rm.epochs, batch_size=cfg.rm.prompts_per_batch, optimizer=cfg.rm.optimizer,
        )
        resume = partial(resumed, cfg, record, {"start": task.path, "comparisons": paths.comparisons})
        with session(cfg), supervised(cfg, task, resume) as trained:
            scores = scores_of(trained, np.concatenate([val, np.arange(count, data.groups[-1] + 1)]))
            shift = float(scores[data.groups >= count].mean())
            trained.save_model(paths.reward, cfg.model.dtype, {SCORE_SHIFT: shift})
            accuracy, interval, pairs = held_out_accuracy(data, val, scores, cfg.seed, "rm.val_fraction")
            record.add(
                val_accuracy=accuracy, ci95=list(interval), val_loss=trained.val["loss"], val_prompts=len(val),
                val_pairs=pairs, comparisons=count, dropped=len(comparisons) - count, score_shift=shift,
                actors=trained.actors, data=task_data.fingerprint(),
            )
            console.print(f"reward model orders {accuracy:.1%} [{interval[0]:.1%}, {interval[1]:.1%}] of held-out "
                          f"pairs as the labeler did; demonstrations score 0 after a shift of {shift:+.3f}")
