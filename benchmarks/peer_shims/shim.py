"""OpenRLHF 0.11.2 on a machine without CUDA, without a change to its files.

Device plumbing is replaced when a module is imported, none of the algorithm:

- torch.cuda.{current_device, synchronize, ...}: do nothing; the current device is "cpu";
- init_device_mesh("cuda", ...): "cpu";
- PyNccl for the weight sync: a gloo group with `broadcast`;
- WorkerWrap.update_weight: no device="cuda", and vLLM's layerwise reload around it, for on CPU vLLM packs weights after
  loading;
- float32 besides bf16 and fp16, also in vLLM;
- SamplingParams: ignore_eos, so that all responses have the same length, and a note of the time in $PEER_TIMES.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

HOOKS = {}


def hook(name):
    """Have the function called with the module of this name, just after its import."""
    def register(function):
        HOOKS[name] = function
        return function

    return register


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self):
        self.looking = set()

    def find_spec(self, name, path=None, target=None):
        if name not in HOOKS or name in self.looking:
            return None
        self.looking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking.discard(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            HOOKS[name](module)

        spec.loader.exec_module = exec_module
        return spec


def install():
    sys.meta_path.insert(0, Finder())


class Cpu(str):
    """The device "cpu", but "0" in the text f"cuda:{device}", which the peer makes and does not use."""

    __slots__ = ()

    def __new__(cls):
        return str.__new__(cls, "cpu")

    def __format__(self, spec):
        return "0"

    def __reduce__(self):
        return (Cpu, ())


def nothing(name):
    def function(*args, **kwargs):
        return None

    function.__name__ = name  # one object each: torch._dynamo keys its rules by them
    return function


@hook("torch.cuda")
def cuda(module):
    device = Cpu()
    module.current_device = lambda: device
    for name in ("synchronize", "empty_cache", "set_device", "current_stream", "ipc_collect",
                 "reset_peak_memory_stats"):
        setattr(module, name, nothing(name))


class GlooCommunicator:
    """What is used of PyNcclCommunicator."""

    def __init__(self, host, port, rank, world_size):
        from vllm.distributed.utils import stateless_init_torch_distributed_process_group as join

        self.rank, self.group = rank, join(host, port, rank, world_size, backend="gloo")

    def broadcast(self, tensor, src=0, stream=None):
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self.group.broadcast([tensor.contiguous()], options).wait()


@hook("openrlhf.utils.distributed_util")
def distributed_util(module):
    module.stateless_init_process_group = (
        lambda address, port, rank, world_size, device: GlooCommunicator(address, port, rank, world_size))


@hook("openrlhf.utils.utils")
def utils(module):
    import torch

    convert = module.convert_to_torch_dtype
    module.convert_to_torch_dtype = lambda name: torch.float32 if name == "fp32" else convert(name)


@hook("openrlhf.utils.deepspeed.deepspeed")
def deepspeed(module):
    init = module.init_device_mesh
    module.init_device_mesh = lambda device, *args, **kwargs: init("cpu", *args, **kwargs)


@hook("openrlhf.trainer.ray.vllm_worker_wrap")
def worker_wrap(module):
    original = module.WorkerWrap.update_weight

    def update_weight(self, *args, **kwargs):
        import torch
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        empty = torch.empty

        def on_cpu(*shape, **options):
            if options.get("device") == "cuda":
                options["device"] = "cpu"
            return empty(*shape, **options)

        if not getattr(self, "_reloading", False):
            initialize_layerwise_reload(self.model_runner.model)
            self._reloading = True
        torch.empty = on_cpu
        try:
            result = original(self, *args, **kwargs)
        finally:
            torch.empty = empty
        if kwargs.get("empty_cache", args[3] if len(args) > 3 else False):  # the last parameter of a sync
            finalize_layerwise_reload(self.model_runner.model, self.model_config)
            self._reloading = False
        return result

    module.WorkerWrap.update_weight = update_weight


@hook("vllm.engine.arg_utils")
def engine_arguments(module):
    original = module.AsyncEngineArgs.__post_init__

    def post_init(self):
        self.dtype = "float32"
        os.environ["OMP_NUM_THREADS"] = os.environ["PEER_ENGINE_THREADS"]  # of the process that is started from here
        return original(self)

    module.AsyncEngineArgs.__post_init__ = post_init


@hook("openrlhf.trainer.ppo_utils.samples_generator")
def samples_generator(module):
    original = module.SamplingParams

    def sampling(**options):
        with Path(os.environ["PEER_TIMES"]).open("a") as file:
            file.write(json.dumps(time.time()) + "\n")
        return original(**options, ignore_eos=True)

    module.SamplingParams = sampling
