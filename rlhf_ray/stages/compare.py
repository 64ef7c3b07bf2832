"""Stage `compare`: K responses per prompt from the SFT policy, ranked (InstructGPT, step 2, first half)."""

import numpy as np

from rlhf_ray.cluster.runtime import session
from rlhf_ray.config.schema import Config
from rlhf_ray.data.formats import Comparison, comparison_row, read_comparisons, write_jsonl
from rlhf_ray.data.prompts import encode_prompts
from rlhf_ray.data.sources import TaskData, load_task_data
from rlhf_ray.metrics.progress import console
from rlhf_ray.models.hub import load_tokenizer
from rlhf_ray.stages.common import Paths, StageRecord, stage
from rlhf_ray.train.answers import answering, prompt_set, sample_answers


def run(cfg: Config) -> None:
    with stage(cfg, "compare") as record:
        if cfg.compare.ranker == "file":
            comparisons = read_comparisons(str(cfg.data.comparisons))
            write_jsonl(Paths(cfg).comparisons, [comparison_row(c) for c in comparisons])
            record.add(ranker=cfg.data.comparisons, comparisons=len(comparisons), actors=[])
            console.print(f"{len(comparisons)} ranked prompts from {cfg.data.comparisons}")
            return
        simulate(cfg, load_task_data(cfg.data), record)


def simulate(cfg: Config, task_data: TaskData, record: StageRecord) -> None:
    """Sample responses and have the simulated labeler rank them."""
    paths, c = Paths(cfg), cfg.compare
    tokenizer = load_tokenizer(str(paths.sft))
    prompts = task_data.compare_prompts()[: c.prompts]
    kept, encoded, dropped = encode_prompts(prompts, cfg.data, tokenizer)
    with session(cfg), answering(cfg, str(paths.sft), prompt_set(encoded)) as (cast, group):
        actors = cast.ready()
        answers = sample_answers(group, prompt_set(encoded), "compare", c.responses_per_prompt, c.temperature,
                                 c.max_response_tokens, cfg.seed)
    labeler, rng = task_data.labeler(c.labeler_scale), np.random.default_rng((cfg.seed, 2))
    comparisons, agreement, ceiling = [], [], []
    texts = [tokenizer.batch_decode([r.tolist() for r in a], skip_special_tokens=True) for a in answers]
    utilities = labeler.utilities([t.strip() for some in texts for t in some]).reshape(len(texts), -1)
    for prompt, responses, u in zip(kept, texts, utilities, strict=True):
        ranks = labeler.rank(u, rng, responses)
        comparisons.append(Comparison(prompt, tuple(responses), tuple(int(r) for r in ranks), "simulated"))
        agreement.append(labeler.expected_self_agreement(u))
        ceiling.append(labeler.noise_ceiling(u))
    write_jsonl(paths.comparisons, [comparison_row(c) for c in comparisons])
    record.add(
        ranker="simulated", comparisons=len(comparisons), dropped=dropped, actors=actors,
        responses_per_prompt=c.responses_per_prompt, data=task_data.fingerprint(),
        labeler={
            **task_data.labeler_accuracy(),
            "self_agreement": float(np.mean(agreement)),
            "self_agreement_between_people": 0.73,  # InstructGPT, section 3.4: between training labelers
            "noise_ceiling": float(np.mean(ceiling)),
        },
    )
    console.print(f"{len(comparisons)} prompts x {c.responses_per_prompt} ranked; the labeler agrees with itself on "
                  f"{np.mean(agreement):.0%} of pairs (people: 73%)")
