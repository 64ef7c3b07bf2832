"""Who judges, and what is right."""

import json
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.schema import Config
from rlhf_ray.data.formats import Message, Prompt
from rlhf_ray.errors import UserError
from rlhf_ray.stages.eval import _accuracies, judge_of

PROMPTS = [Prompt((Message("user", "1 + 2"),), metadata='{"answer": "3"}'), Prompt((Message("user", "hello"),))]
TEXTS = ["<user>1 + 2<assistant>", "<user>hello<assistant>"]


class Classifier:
    def log_odds(self, texts: Any) -> np.ndarray:
        return np.array([float(len(t)) for t in texts])


class Data:
    """What judge_of asks of the data of a run."""

    def __init__(self, verify: Any = None, classifier: Any = None):
        self.verify, self.classifier = verify, classifier

    def verifier(self) -> Any:
        return self.verify

    def judge(self) -> Any:
        return self.classifier

    def judge_accuracy(self) -> dict[str, Any]:
        return {"held_out_accuracy": 0.75}


def test_a_verifier_judges_where_there_is_one_and_reads_prompt_response_and_metadata() -> None:
    seen = []

    def verify(prompts: list[str], responses: list[str], metadata: list[dict]) -> list[float]:
        seen.append((prompts, responses, json.loads(json.dumps(metadata))))
        metadata[0].clear()  # what it does to its arguments is its own affair
        return [1.0, 0.5]

    judge = judge_of(Data(verify, Classifier()), PROMPTS, TEXTS, has_rm=True)
    assert judge.verifies and judge.scores is not None
    assert judge.record["held_out_accuracy"] is None and "verifier" in judge.record["is"]
    assert judge.scores(["3", "hi"]).tolist() == [1.0, 0.5]
    judge.scores(["4", "hi"])
    assert seen == [(TEXTS, [first, "hi"], [{"answer": "3"}, {}]) for first in ("3", "4")]


def test_then_a_classifier_then_the_reward_model_then_nobody() -> None:
    judge = judge_of(Data(classifier=Classifier()), PROMPTS, TEXTS, has_rm=True)
    assert judge.scores is not None and not judge.verifies
    assert judge.scores(["a", "bcd"]).tolist() == [1, 3]
    assert judge.record["held_out_accuracy"] == 0.75 and "classifier" in judge.record["is"]
    judge = judge_of(Data(), PROMPTS, TEXTS, has_rm=True)
    assert judge.scores is None and not judge.verifies
    assert judge.record["held_out_accuracy"] is None and "not independent" in judge.record["is"]
    with pytest.raises(UserError, match=r"nobody can judge: .* run `rlhf-ray rm` first"):
        judge_of(Data(), PROMPTS, TEXTS, has_rm=False)


def test_right_answers_of_every_model_and_what_the_policy_gained_on_sft() -> None:
    """Of 4 prompts base has 0 right, sft 2, the policy 3: one lost, two gained."""
    cfg = Config()
    cfg.eval.policy = "dpo"
    right = {"base": [0, 0, 0, 0], "sft": [1, 1, 0, 0], "dpo": [1, 0, 1, 1]}
    found = _accuracies(cfg, {name: np.array(r, bool) for name, r in right.items()})
    assert [found[name]["right"] for name in ("base", "sft", "dpo")] == [0, 2, 3]
    assert found["dpo"]["rate"] == 0.75 and found["dpo"]["n"] == 4
    gain = found["dpo_minus_sft"]
    assert (gain["gained"], gain["lost"], gain["difference"]) == (2, 1, 0.25)
