"""The numbers of metrics.jsonl as Prometheus gauges, through Ray: they appear beside Ray's own, as `ray_<name>`.

A name is `rlhf_<role>_<what>_<unit>`. A gauge keeps its last number as long as its stage runs: what an iteration does
not measure (None, NaN) leaves it as it was. Ray drops what has not been said again for 20 seconds, two of its report
intervals: so they are said again and again, and are gone soon after the stage has ended or its driver was killed.
"""

import math
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "ray_"  # which Ray puts before every name
RUN = "run"  # the label that all have: storage.run_name
STAGE = "stage"  # the label of the supervised stages' gauges
REPEAT_S = 4.0  # how often every number is said again: in each of Ray's report intervals, whatever this process is at
# The unit at the end of a name, and Grafana's word for it.
UNITS = {
    "nats_per_token": "none", "nats_per_response": "none", "nats": "none", "log_odds": "none",
    "points": "none",  # whatever the reward source counts in
    "squared_points": "none", "points_per_nat": "none",
    "advantages": "none",  # of the algorithm: in points, or in their standard deviations
    "norm": "none",  # Euclidean, of the gradient of a mean loss
    "rate": "sci",
    "ratio": "percentunit",  # a share, 0 to 1 unless said otherwise
    "times": "none",
    "tokens": "none", "tokens_per_second": "none", "steps": "none", "responses": "none", "calls": "none",
    "actors": "none", "stages": "none", "versions": "none", "number": "none",
    "seconds": "s", "gib": "gbytes",
}


@dataclass(frozen=True)
class Measure:
    """A key of metrics.jsonl (# stands for a number), its gauge, and the labels that it has besides `run`.

    A number in the key is the value of its label. The keys of a dict are split at the last hyphen if there are two
    labels: `policy-0` has role policy and rank 0.
    """

    key: str
    name: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """The longest of UNITS that the name ends with."""
        return max((unit for unit in UNITS if self.name.endswith(f"_{unit}")), key=len)


TABLE = {m.key: m for m in (  # of ppo
    Measure("iteration", "rlhf_trainer_iteration_number", "Last iteration that is done."),
    # rewards
    Measure("score", "rlhf_reward_score_points", "Mean score of a response: the weighted sum of all reward sources."),
    Measure("score_std", "rlhf_reward_score_deviation_points", "Standard deviation of scores."),
    Measure("score_#", "rlhf_reward_source_score_points", "Mean score by one reward source, unweighted; source: its "
            "place in reward.sources, from 1.", ("source",)),
    Measure("score_clip_fraction", "rlhf_reward_clipped_ratio", "Share of scores clipped at reward.clip."),
    Measure("reward", "rlhf_reward_shaped_points", "Mean reward of a response: shaped score less KL penalty."),
    Measure("reward_seconds", "rlhf_reward_working_seconds", "Time that the actors of a reward source worked in an "
            "iteration, summed.", ("role",)),
    Measure("reward_retries", "rlhf_reward_retried_calls", "Calls of reward sources tried again in an iteration."),
    Measure("equal_groups", "rlhf_reward_equal_groups_ratio", "Share of groups whose scores are all equal."),
    Measure("judge_score", "rlhf_judge_score_log_odds", "Mean score by the judge, who is no part of the reward."),
    # responses
    Measure("response_length", "rlhf_generator_response_tokens", "Mean length of a response."),
    Measure("truncated", "rlhf_generator_truncated_ratio", "Share of responses cut at rollout.max_response_tokens."),
    Measure("dropped", "rlhf_trainer_dropped_responses", "Responses left out of the update, in an iteration."),
    Measure("empty", "rlhf_generator_empty_responses", "Responses without a token, in an iteration."),
    Measure("repeated_ngrams", "rlhf_generator_repeated_ratio", "Share of 3-grams seen before in their response."),
    Measure("mismatch", "rlhf_generator_mismatch_nats_per_token", "Mean |trainer - engine| log-probability."),
    Measure("weight_version", "rlhf_generator_weights_number", "Oldest version of the weights that a generator holds."),
    Measure("weight_versions", "rlhf_generator_engine_weights_number", "Version of the weights that an engine said it "
            "holds, after the last sync.", ("role", "rank")),
    Measure("staleness", "rlhf_generator_behind_versions", "Versions between the weights that sampled an iteration's "
            "oldest responses and those that learnt from them."),
    Measure("importance_ess", "rlhf_policy_importance_effective_ratio", "Effective sample size of the importance "
            "weights, as a share."),
    Measure("importance_clip_fraction", "rlhf_policy_importance_capped_ratio", "Share of importance weights capped."),
    Measure("importance_max", "rlhf_policy_importance_largest_times", "Largest importance weight before the cap."),
    # the policy
    Measure("kl_per_sequence", "rlhf_policy_kl_nats_per_response", "KL from the reference, mean over responses."),
    Measure("kl_per_token", "rlhf_policy_kl_nats_per_token", "KL from the reference, mean over tokens."),
    Measure("update_kl_per_token", "rlhf_policy_update_kl_nats_per_token", "KL of an iteration's updates."),
    Measure("kl_coef", "rlhf_trainer_kl_penalty_points_per_nat", "KL coefficient."),
    Measure("entropy", "rlhf_policy_entropy_nats_per_token", "Mean entropy before the update."),
    Measure("policy_loss", "rlhf_policy_loss_advantages", "Clipped policy loss."),
    Measure("kl_loss", "rlhf_policy_kl_loss_nats_per_token", "KL term of the loss, before its coefficient, averaged "
            "as the algorithm averages."),
    Measure("ptx_loss", "rlhf_policy_text_loss_nats_per_token", "Language-model loss on the pre-training mix."),
    Measure("clip_fraction", "rlhf_policy_clipped_ratio", "Share of tokens whose ratio was clipped."),
    Measure("clamped_tokens", "rlhf_policy_clamped_tokens", "Tokens whose log-ratio was clamped, in an iteration."),
    Measure("policy_grad_norm", "rlhf_policy_gradient_norm", "Norm of the gradient before clipping."),
    Measure("rl_grad_norm", "rlhf_policy_reward_gradient_norm", "The part that is of the reward."),
    Measure("ptx_grad_norm", "rlhf_policy_text_gradient_norm", "The part that is of the pre-training mix."),
    Measure("policy_lr", "rlhf_policy_learning_rate", "Learning rate."),
    Measure("policy_skipped_steps", "rlhf_policy_skipped_steps", "Optimizer steps skipped in an iteration, for "
            "gradients that were not finite."),
    # the critic
    Measure("value_loss", "rlhf_critic_loss_squared_points", "Clipped value loss."),
    Measure("value_clip_fraction", "rlhf_critic_clipped_ratio", "Share of tokens whose value was clipped."),
    Measure("explained_variance", "rlhf_critic_explained_variance_ratio", "Share of the returns' variance that the "
            "critic explains; at most 1, negative if worse than their mean."),
    Measure("critic_grad_norm", "rlhf_critic_gradient_norm", "Norm of the gradient before clipping."),
    Measure("critic_skipped_steps", "rlhf_critic_skipped_steps", "Optimizer steps skipped in an iteration, for "
            "gradients that were not finite."),
    # the run
    Measure("running", "rlhf_trainer_running_stages", "1 while the stage runs, 0 after it; not in metrics.jsonl."),
    Measure("tokens_per_second", "rlhf_trainer_response_tokens_per_second", "Response tokens over the time of the "
            "whole iteration."),
    Measure("role_tokens_per_second", "rlhf_actor_tokens_per_second", "Tokens over the time that a role works, all its "
            "actors together: sampled ones of generators, else those of prompts and responses.", ("role",)),
    Measure("waiting_calls", "rlhf_actor_waiting_calls", "Calls of a role not yet answered when the last response was "
            "sampled.", ("role",)),
    Measure("seconds", "rlhf_trainer_phase_seconds", "Time of each phase of an iteration.", ("phase",)),
    Measure("generators", "rlhf_generator_working_actors", "Generators that share the work."),
    Measure("restarts", "rlhf_trainer_restarted_actors", "Actors of a role replaced since this driver began.",
            ("role",)),
    Measure("memory_gib", "rlhf_actor_memory_gib", "Resident memory of an actor.", ("role", "rank")),
)}
SUPERVISED = {m.key: m for m in (  # of pretrain, sft, rm and dpo
    Measure("step", "rlhf_supervised_step_number", "Last optimizer step that is done.", (STAGE,)),
    Measure("running", "rlhf_supervised_running_stages", "1 while the stage runs, 0 after it; not in metrics.jsonl.",
            (STAGE,)),
    Measure("loss", "rlhf_supervised_loss_nats", "Loss of a step: mean over tokens (pretrain, sft), or over pairs of "
            "each prompt and then prompts (rm, dpo).", (STAGE,)),
    Measure("accuracy", "rlhf_supervised_accuracy_ratio", "Share of a step's pairs in the order of their ranks (rm, "
            "dpo).", (STAGE,)),
    Measure("lr", "rlhf_supervised_learning_rate", "Learning rate.", (STAGE,)),
    Measure("tokens_per_second", "rlhf_supervised_tokens_per_second", "Tokens of a step over the time that it took; "
            "not in metrics.jsonl.", (STAGE,)),
)}


def series(
    values: Mapping[str, Any], table: Mapping[str, Measure] = TABLE
) -> Iterator[tuple[Measure, dict[str, str], float]]:
    """(measure, labels without `run`, number) of every finite number in values that the table knows."""
    for key, value in values.items():
        measure, place = _find(key, table)
        if measure is None:
            continue
        for name, entry in value.items() if isinstance(value, Mapping) else ((place, value),):
            parts = name.rpartition("-")[::2] if len(measure.labels) == 2 else (name,)
            number = math.nan if entry is None else float(entry)
            if math.isfinite(number):
                yield measure, dict(zip(measure.labels, parts, strict=False)), number


def unknown(keys: Mapping[str, Any]) -> set[str]:
    """Keys of metrics.jsonl that TABLE lacks."""
    return {key for key in keys if _find(key, TABLE)[0] is None}


def _find(key: str, table: Mapping[str, Measure]) -> tuple[Measure | None, str]:
    """(the measure, the number that its key ends with)."""
    if key in table:
        return table[key], ""
    numbered = re.fullmatch(r"(.+_)(\d+)", key)
    return (table.get(f"{numbered[1]}#"), numbered[2]) if numbered else (None, "")


class Gauges:
    """The gauges of one stage of a run, said again and again until `close`. Does nothing where Ray does not run."""

    def __init__(self, run: str, stage: str) -> None:
        self.run, self.stage = run, stage
        self._gauges: dict[str, Any] = {}  # by name
        self._last: dict[str, list[tuple[dict[str, str], float]]] = {}  # by name: labels and number of each series
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._repeating = threading.Thread(target=self._repeat, name="gauges", daemon=True)
        self._repeating.start()

    def set(self, values: Mapping[str, Any]) -> None:
        """Set all that the stage's table knows; values: as metrics.jsonl has them. Nothing is sent here: Ray's own
        thread does. Of a gauge that is set, other series than those set now go: those of an actor that is gone."""
        import ray
        from ray.util.metrics import Gauge

        if not ray.is_initialized():
            return
        table = TABLE
        if self.stage != "ppo":
            values, table = {key: {self.stage: value} for key, value in values.items()}, SUPERVISED
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        with self._lock:
            for measure, labels, number in series(values, table):
                if measure.name not in self._gauges:
                    self._gauges[measure.name] = Gauge(measure.name, measure.help, (RUN, *measure.labels))
                found.setdefault(measure.name, []).append(({RUN: self.run, **labels}, number))
            self._last |= found
            self._say(found)

    def close(self) -> None:
        """Say nothing again from here on."""
        self._closed.set()
        self._repeating.join()

    def _repeat(self) -> None:
        import ray

        while not self._closed.wait(REPEAT_S):
            with self._lock:
                if ray.is_initialized():
                    self._say(self._last)

    def _say(self, numbers: Mapping[str, list[tuple[dict[str, str], float]]]) -> None:
        for name, some in numbers.items():
            for labels, number in some:
                self._gauges[name].set(number, labels)
