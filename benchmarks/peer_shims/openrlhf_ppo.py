"""OpenRLHF's PPO command, unedited, on a Ray with made-up GPUs; it places every role by num_gpus=1."""

import argparse
import os
import runpy
import time

import ray

PASSED_ON = ("PEER_", "VLLM_", "DS_", "OMP_", "RAY_ENABLE_", "PYTHONPATH")

if __name__ == "__main__":
    env = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    ray.init(num_gpus=5, num_cpus=12, include_dashboard=False, runtime_env={"env_vars": env})
    add_argument = argparse.ArgumentParser.add_argument

    def widened(self, *args, **kwargs):
        if args and args[0] == "--ds.param_dtype":
            kwargs["choices"] = ["bf16", "fp16", "fp32"]
        return add_argument(self, *args, **kwargs)

    argparse.ArgumentParser.add_argument = widened
    started = time.time()
    try:
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
    finally:
        print(f"trained for {time.time() - started:.1f} s", flush=True)
        ray.shutdown()
