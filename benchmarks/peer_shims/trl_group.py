"""TRL's GRPO or RLOO trainer on a workload: python trl_group.py grpo|rloo MODEL PROMPTS EXACT|VARYING ITERATIONS

16 prompts x 4 completions in an iteration, one optimizer step, micro-batches of 8, transformers' generate. The last
line is JSON: seconds of each iteration, and the mean length of completions in the last one.
"""

import json
import os
import sys
import time
from pathlib import Path

KIND, MODEL, PROMPTS, LENGTHS, ITERATIONS = sys.argv[1:]
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": "",
               "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch  # noqa: E402
import trl  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402

torch.set_num_threads(os.cpu_count())
RESPONSE, GROUP, BATCH, MICRO = 64, 4, 64, 8


def reward(completions, **_):
    return [len(set(text)) / 32 for text in completions]


class Clock(TrainerCallback):
    def __init__(self):
        self.ends = []

    def on_train_begin(self, *args, **kwargs):
        self.ends.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


config, trainer = ((trl.GRPOConfig, trl.GRPOTrainer) if KIND == "grpo" else (trl.RLOOConfig, trl.RLOOTrainer))
exact = {"generation_kwargs": {"min_new_tokens": RESPONSE}} if LENGTHS == "EXACT" else {}
clock = Clock()
run = trainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa"),
    reward_funcs=reward, processing_class=AutoTokenizer.from_pretrained(MODEL, padding_side="left"),
    train_dataset=load_dataset("json", data_files=PROMPTS, split="train").select_columns(["prompt"]), callbacks=[clock],
    args=config(
        output_dir=str(Path(PROMPTS).parent / "trl"), per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO, num_generations=GROUP, max_completion_length=RESPONSE,
        max_steps=int(ITERATIONS), use_vllm=False, use_cpu=True, bf16=False, fp16=False, logging_steps=1,
        report_to="none", save_strategy="no", temperature=1.0, top_p=1.0, learning_rate=1e-6, beta=0.01,
        gradient_checkpointing=False, dataloader_num_workers=0, disable_tqdm=True, seed=0, **exact))
run.train()
lengths = [row["completions/mean_length"] for row in run.state.log_history if "completions/mean_length" in row]
print(json.dumps({"seconds": [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)], "length": lengths[-1]}))
