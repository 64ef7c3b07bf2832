"""Stage `compare`: K responses per prompt from the SFT policy, ranked (InstructGPT, step 2, first half)."""

import numpy as np

from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.schema import Config
from rlhf_ray.data.formats import Comparison, Prompt, comparison_row, read_comparisons, write_jsonl
from rlhf_ray.data.prompts import encode_prompts
from rlhf_ray.data.sources import TaskData, load_task_data
from rlhf_ray.metrics.progress import console
from rlhf_ray.models.hub import load_tokenizer
from rlhf_ray.stages.common import Paths, StageRecord, model_fingerprint, stage
from rlhf_ray.stages.lock import locked
from rlhf_ray.storage import shown
from rlhf_ray.train.answers import ANSWERS, answering, forget_answers, prompt_set, sample_answers

PEOPLE_AGREE = 0.73  # between two training labelers: Ouyang et al. 2022, section 3.4


def run(cfg: Config) -> None:
    with locked(Paths(cfg).root):
        with stage(cfg, "compare") as record:
            if cfg.compare.ranker == "file":
                take_file(cfg, record)
            elif cfg.compare.ranker == "people":
                ask_people(cfg, load_task_data(cfg.data), record)
            else:
                simulate(cfg, load_task_data(cfg.data), record)
        forget_answers(Paths(cfg).stage("compare"))


def take_file(cfg: Config, record: StageRecord) -> None:
    """People have ranked: check every line and take it over."""
    comparisons = read_comparisons(str(cfg.data.comparisons))
    write_jsonl(Paths(cfg).comparisons, [comparison_row(c) for c in comparisons])
    record.add(ranker=cfg.data.comparisons, comparisons=len(comparisons), actors=[])
    console.print(f"{len(comparisons)} ranked prompts from {cfg.data.comparisons}")


def ask_people(cfg: Config, task_data: TaskData, record: StageRecord) -> None:
    """Write the responses down unranked: rows to which people add `ranks` and `labeler`."""
    prompts, texts = sample(cfg, task_data, record)
    rows = [comparison_row(Comparison(p, tuple(t), (), "")) for p, t in zip(prompts, texts, strict=True)]
    path = Paths(cfg).stage("compare") / "to_rank.jsonl"
    write_jsonl(path, rows)
    record.add(ranker="people", to_rank=len(rows))
    console.print(f"{len(rows)} prompts wait in {shown(path)}: fill in `ranks` (1 is best, equal numbers are a tie) "
                  "and `labeler`, then go on with compare.ranker=file data.comparisons=RANKED")


def simulate(cfg: Config, task_data: TaskData, record: StageRecord) -> None:
    """Have the simulated labeler rank the responses."""
    prompts, texts = sample(cfg, task_data, record)
    labeler, rng = task_data.labeler(cfg.compare.labeler_scale), np.random.default_rng((cfg.seed, 2))
    comparisons, agreement, ceiling = [], [], []
    utilities = labeler.utilities([t for some in texts for t in some]).reshape(len(texts), -1)
    for prompt, responses, u in zip(prompts, texts, utilities, strict=True):
        ranks = labeler.rank(u, rng, responses)
        comparisons.append(Comparison(prompt, tuple(responses), tuple(int(r) for r in ranks), "simulated"))
        agreement.append(labeler.expected_self_agreement(u))
        ceiling.append(labeler.noise_ceiling(u))
    write_jsonl(Paths(cfg).comparisons, [comparison_row(c) for c in comparisons])
    record.add(
        ranker="simulated", comparisons=len(comparisons),
        labeler={
            **task_data.labeler_accuracy(),
            "self_agreement": float(np.mean(agreement)),
            "self_agreement_between_people": PEOPLE_AGREE,
            "noise_ceiling": float(np.mean(ceiling)),
        },
    )
    console.print(f"{len(comparisons)} prompts x {cfg.compare.responses_per_prompt} responses ranked; the labeler "
                  f"agrees with itself on {np.mean(agreement):.0%} of pairs (people: {PEOPLE_AGREE:.0%})")


def sample(cfg: Config, task_data: TaskData, record: StageRecord) -> tuple[list[Prompt], list[list[str]]]:
    """K responses of the SFT policy to every prompt: (prompts, [prompts][K] texts)."""
    path, c = str(Paths(cfg).sft), cfg.compare
    directory, tokenizer = Paths(cfg).stage("compare"), load_tokenizer(path)
    if cfg.resume == "never":
        forget_answers(directory)
    kept, encoded, dropped = encode_prompts(task_data.compare_prompts()[: c.prompts], cfg.data, tokenizer)
    with session(cfg), answering(cfg, path, prompt_set(encoded), Paths(cfg).stage("compare")) as (cast, group):
        actors = cast.persist(cast.ready)
        answers = sample_answers(cast, group, path, prompt_set(encoded), "compare", c.responses_per_prompt,
                                 c.temperature, c.max_response_tokens, cfg.seed, journal=directory / f"{ANSWERS}.jsonl",
                                 model=f"{model_fingerprint(path)} {cfg.model.dtype}")
    record.add(dropped=dropped, actors=actors, responses_per_prompt=c.responses_per_prompt,
               data=task_data.fingerprint())
    return kept, [tokenizer.batch_decode([r.tolist() for r in some], skip_special_tokens=True) for some in answers]
