"""Whatever dies, whenever: the run ends as if nothing had happened, to the last bit.

CHAOS_FAULTS=100 has as many seeded faults instead of one or two for each role; CHAOS_RESULTS is the directory for their
table.
"""

import json
import os
import signal
from pathlib import Path
from statistics import median

import pytest
from transformers import AutoModelForCausalLM

from chaos.harness import Fault, chaos, kill, outcome, recovery_times, results, seeded
from end_to_end.small import TEXTS, WORDS, earlier_stages, ppo_config, small_config
from rlhf_ray.cluster.cast import Cast
from rlhf_ray.cluster.group import wait
from rlhf_ray.core.types import Sample
from rlhf_ray.data import sources
from rlhf_ray.data.sentiment import SentimentClassifier
from rlhf_ray.data.sources import FileData
from rlhf_ray.errors import RunFailed
from rlhf_ray.stages import compare, export, ppo, sft
from rlhf_ray.train import answers, roles, supervised
from rlhf_ray.train.answers import prompt_set

FAULTS = [
    Fault(1, "rollout", "generator", 0),
    Fault(2, "score", "reference"),
    Fault(3, "update", "policy", 1, delay=0.03),
    Fault(4, "weight_sync", "generator", 1),
    Fault(5, "score", "reward"),
    Fault(6, "update", "critic", delay=0.03),
    Fault(7, "weight_sync", "policy", 0),
    Fault(8, "rollout", "generator", 1, signal=signal.SIGSTOP),
    Fault(9, "score", "policy", 0),
    Fault(10, "checkpoint", "policy", 1),
    Fault(11, "writing", "critic", delay=0.01),
    Fault(12, "score", "reward_2"),
    Fault(13, "score", "judge"),
]


class Judged(FileData):
    """A user's files, and a judge as the embedded reviews have one."""

    def judge(self) -> SentimentClassifier:
        return SentimentClassifier(TEXTS, [i % 2 for i in range(len(TEXTS))])


def config(directory, models, reward_model):
    cfg = ppo_config(directory, models[0], "ppo_ptx")
    cfg.roles.generator.replicas = cfg.roles.policy.ranks = 2
    cfg.reward.sources = ["model", "chaos.rewards:brevity"]
    cfg.cluster.heartbeat_s, cfg.cluster.heartbeat_timeout_s = 0.5, 6.0
    cfg.algorithm.ema_decay = 0.9
    earlier_stages(directory, models[0], reward_model)
    return cfg


def test_every_role_may_die(ray_session, models, reward_model, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])  # where the reward function is found
    faults, long = FAULTS, int(os.environ.get("CHAOS_FAULTS", "0"))
    if long:
        faults = seeded(long, sorted({(f.role, f.index) for f in FAULTS}), seed=0)
    runs = []
    for name in ("plain", "faulty"):
        runs.append(config(tmp_path / name, models, reward_model))
        runs[-1].ppo.iterations = len(faults) + 3
    data = Judged(runs[0].data)
    for cfg in runs:  # what has a judge has the name of the reviews
        cfg.data.source = "reviews"
    monkeypatch.setattr(sources, "_review_data", lambda seed: data)
    ppo.run(runs[0])
    with chaos(faults) as script:
        ppo.run(runs[1])
    assert not script.left and len(script.struck) == len(faults)
    (weights, rows), (expected, plain_rows) = outcome(runs[1]), outcome(runs[0])
    assert rows == plain_rows and "judge_score" in rows[0]
    assert weights == expected
    hangs, deadline = [f.noticed for f in faults if f.signal == signal.SIGSTOP], runs[1].cluster.heartbeat_timeout_s
    assert all(0 < noticed <= 2 * deadline for noticed in hangs)  # a question may be on its way when it is struck
    results("recovery", {
        "faults": len(faults), "iteration_s": median(script.plain), "roles": recovery_times(script),
        "hangs": {"faults": len(hangs), "deadline_s": deadline, "noticed_after_s": round(max(hangs), 1)}})


def test_when_the_attempts_are_used_up_it_says_why_and_can_go_on(ray_session, models, reward_model, tmp_path,
                                                                 monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    cfg = config(tmp_path, models, reward_model)
    cfg.ppo.iterations, cfg.cluster.attempts = 3, 0
    with chaos([Fault(2, "rollout", "generator", 1)]), pytest.raises(RunFailed):
        ppo.run(cfg)
    (directory,) = (tmp_path / "ppo").glob("post_mortem-*")
    report = json.loads((directory / "report.json").read_text())
    assert (report["cause"], report["first"]["role"], report["first"]["index"]) == ("killed", "generator", 1)
    assert (report["iteration"], report["phase"], report["missing"]) == (2, "rollout", [])
    assert "generator-1" in capsys.readouterr().out
    assert {"summary.txt", "traceback.txt", "memory.csv", "memory.png", "config.yaml", "logs"} <= {
        p.name for p in directory.iterdir()}
    assert not (tmp_path / "ppo/stage.json").exists()
    assert [p.name for p in (tmp_path / "ppo/checkpoints").iterdir()] == ["step-00000001"]
    ppo.run(cfg)
    assert [row["iteration"] for row in outcome(cfg)[1]] == [1, 2, 3]


def test_so_may_a_supervised_learner_and_a_generator_of_compare(ray_session, models, tmp_path, monkeypatch):
    """In the middle of the stage, the learner behind its last step too; what comes out is what comes out without."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"tell of {a} and {b}", "response": f"{b} {a}"}) + "\n"
                               for a in WORDS for b in WORDS[:8]))
    made = []
    for name in ("plain", "faulty"):
        cfg = small_config(models[0])
        cfg.output_dir, cfg.stages = str(tmp_path / name), ["sft", "compare"]
        cfg.data.source, cfg.data.demonstrations, cfg.data.compare_prompts = "files", str(prompts), str(prompts)
        cfg.roles.supervised.ranks, cfg.sft.epochs, cfg.checkpoint.seconds = 2, 2.0, 0.5
        cfg.compare.ranker, cfg.compare.prompts, cfg.compare.max_response_tokens = "people", 160, 12
        with monkeypatch.context() as patched:
            if name == "faulty":
                learn, dealt = supervised.SupervisedTrainer.learn, supervised.SupervisedTrainer.dealt
                answered, measured = answers._answered, []

                def learning(self, units, learn=learn):
                    if self.step == 5 and not self.recovery.restarts:
                        kill(self.recovery.cast.group("supervised").actors[1])
                    learn(self, units)

                def dealing(self, method, units, dealt=dealt, measured=measured):
                    if method.__name__ == "evaluate":
                        measured.append(self.step)
                        if len(measured) == 1:
                            kill(self.recovery.cast.group("supervised").actors[0])
                    return dealt(self, method, units)

                def answering(group, parts, *args, answered=answered):
                    for i, part in enumerate(answered(group, parts, *args)):
                        if i == 1 and len(parts) == 4:  # the first attempt: of five, one is done
                            kill(group.actors[0])
                        yield part

                patched.setattr(supervised.SupervisedTrainer, "learn", learning)
                patched.setattr(supervised.SupervisedTrainer, "dealt", dealing)
                patched.setattr(answers, "_answered", answering)
            sft.run(cfg)
            compare.run(cfg)
        made.append([(tmp_path / name / file).read_bytes() for file in (
            "sft/model/model.safetensors", "compare/to_rank.jsonl")])
    assert made[0] == made[1]


def test_a_checkpoint_becomes_a_model_for_others(ray_session, models, reward_model, tmp_path):
    """Exported, it loads with transformers and in vLLM, and says there what the policy of the run says."""
    cfg = ppo_config(tmp_path, models[0], "grpo")
    cfg.ppo.iterations = 2
    earlier_stages(tmp_path, models[0], reward_model)
    ppo.run(cfg)
    cfg.export.checkpoint, cfg.export.path = 2, str(tmp_path / "mine")
    export.run(cfg)
    a, b = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (cfg.export.path, tmp_path / "ppo/model"))
    assert all((a[name] == b[name]).all() for name in b)
    prompts = prompt_set([[5, 6, 7], [8, 9]])
    said = []
    for path in (cfg.export.path, str(tmp_path / "ppo/model")):
        with Cast(roles.layout_of(cfg, ["generator"]), cfg.cluster) as cast:
            group = roles.generators(cast, cfg, path, prompts, "gloo")
            cast.ready()
            refs = [group.actors[0].answer.remote([Sample(0, 0, 1), Sample(1, 1, 2)], 0.0, 12)]
            said.append([r.tolist() for r in wait(refs, 120, "answer")[0]])
    assert said[0] == said[1] and said[0][0]
