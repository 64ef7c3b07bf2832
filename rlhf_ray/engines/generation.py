"""vLLM inside an actor's own process: sampling with recorded seeds and log-probabilities.

The only file besides `weight_sync` and its wires that imports vllm.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from rlhf_ray import storage
from rlhf_ray.config.schema import GeneratorConfig, ModelConfig
from rlhf_ray.engines.gloo import share_devices
from rlhf_ray.errors import UserError
from rlhf_ray.models.light import absent


@dataclass(frozen=True)
class Request:
    """One response to sample: prompt token ids and the seed of its own random stream."""

    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Response:
    """What was sampled: token ids int32 [n], their log-probabilities float32 [n], cut by the length limit or not."""

    index: int
    ids: np.ndarray
    logprobs: np.ndarray
    truncated: bool


_BLOCK = 128  # tokens of a block of the KV cache on CPU

# Of an engine on CPU, to be set before vLLM is imported.
CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default pins all threads of all engines to one core
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Counting ranks of log-probabilities is wrapped in torch.compile: 20 s of g++ in every fresh process.
    "TORCH_COMPILE_DISABLE": "1",
}


def import_vllm() -> None:
    """With its environment, and without what it does not need."""
    import torch

    if not torch.cuda.is_available():
        os.environ.update(CPU_ENVIRONMENT)
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would go before our own kv_cache_memory_bytes
    with absent("sklearn", "scipy"):
        from vllm import LLM  # noqa: F401


def kv_cache_bytes(path: str, model: ModelConfig, cfg: GeneratorConfig, limit: int) -> int:
    """KV cache of an engine: what `max_num_seqs` of the longest sequences take, `limit` at most. On CPU vLLM writes
    zeros all over it at the start, and to touch a GiB for the first time may take seconds."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(path).get_text_config()
    layers, heads, size = (getattr(text, name, None) for name in (
        "num_hidden_layers", "num_attention_heads", "hidden_size"))
    if not (layers and heads and size):
        return limit
    heads_kept = getattr(text, "num_key_value_heads", None) or heads
    width = _padded(getattr(text, "head_dim", None) or size // heads, 32)
    per_token = 2 * layers * heads_kept * width * (4 if model.dtype == "float32" else 2)
    return min(limit, per_token * (cfg.max_num_seqs + 1) * (_padded(model.max_length, _BLOCK) + _BLOCK))


def cache_limit(path: str, model: ModelConfig, cfg: GeneratorConfig) -> int | None:
    """Bytes that the KV cache may take at most; None: vLLM finds out by a pass of the largest batch.

    On a GPU which others use as well it must not: whatever they take or let go meanwhile would count as the engine's.
    Raises UserError if its share of the GPU is too small for the weights.
    """
    import torch

    if not torch.cuda.is_available():
        return cfg.kv_cache_gib * 2**30
    if cfg.gpus == 1:
        return None
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        parameters: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).parameters()
    weights = sum(p.numel() for p in parameters) * (4 if model.dtype == "float32" else 2)
    share = int(cfg.gpu_memory_utilization * torch.cuda.get_device_properties(0).total_memory)
    limit = share - weights - share // 10 - 2**30  # activations, and what CUDA itself takes
    if limit <= 0:
        raise UserError(f"roles.generator.gpu_memory_utilization={cfg.gpu_memory_utilization:g} is "
                        f"{share / 2**30:.1f} GiB of this GPU, too little for weights of {weights / 2**30:.1f} GiB and "
                        "a KV cache: raise it")
    return limit


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class GenerationEngine:
    """A vLLM engine whose weights can be replaced through vLLM's weight-transfer interface.

    Sampling is neutral (no top-p, top-k, min-p or penalties), so that the log-probabilities it reports, taken
    after temperature, are those of the distribution it sampled from.
    """

    def __init__(
        self, path: str, model: ModelConfig, cfg: GeneratorConfig, sync_backend: str, seed: int, shared: bool = False
    ):
        """shared: the device is another's in turn, so that the engine must be able to sleep."""
        import torch

        if cfg.tensor_parallel_size == 1:
            # The engine lives in the actor's own process: ready in seconds, and CUDA IPC handles need no pickling.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import_vllm()
        from vllm import LLM

        gc.freeze()  # vLLM collects garbage five times as it starts: not again among what was just imported
        from vllm.config import WeightTransferConfig

        from rlhf_ray.engines.weight_sync import register

        register()
        storage.fetch(Path(path))
        if not torch.cuda.is_available():
            torch.set_num_threads(cfg.threads)
            share_devices()
        limit = cache_limit(path, model, cfg)
        self.llm: Any = LLM(
            path, dtype=cast(Any, model.dtype), max_model_len=model.max_length, enforce_eager=cfg.enforce_eager,
            tensor_parallel_size=cfg.tensor_parallel_size, max_num_seqs=cfg.max_num_seqs,
            gpu_memory_utilization=cfg.gpu_memory_utilization, logprobs_mode="processed_logprobs", seed=seed,
            distributed_executor_backend="uni" if cfg.tensor_parallel_size == 1 else "mp",
            weight_transfer_config=WeightTransferConfig(backend=sync_backend), disable_log_stats=True,
            worker_extension_cls="rlhf_ray.engines.weight_sync.WorkerExtension",
            # A model and its tokenizer decide how to sample; a generation_config.json must not.
            generation_config="vllm", enable_sleep_mode=shared,
            kv_cache_memory_bytes=None if limit is None else kv_cache_bytes(path, model, cfg, limit),
        )
        if shared:
            self.llm.collective_rpc("share_device")
        self.version, self._path = 0, path  # "": of no path
        self._asleep = {"weights": False, "kv_cache": False}
        self._requests = 0

    def sample(
        self, requests: Sequence[Request], temperature: float, max_tokens: int,
        before_step: Callable[[], object] = lambda: None,
    ) -> Iterator[Response]:
        """Sample all; responses come as they finish, `index` says which request each answers.

        Whoever wants no more closes the iterator, or raises in `before_step`, which is called before each step of the
        engine; what is under way is then dropped.
        """
        from vllm import SamplingParams

        engine, numbers = self.llm.llm_engine, {}
        for i, request in enumerate(requests):
            self._requests += 1
            params = SamplingParams(
                temperature=temperature, max_tokens=max_tokens, seed=request.seed, logprobs=0, flat_logprobs=True,
                detokenize=False,
            )
            name = str(self._requests)
            numbers[name] = i
            engine.add_request(name, {"prompt_token_ids": request.prompt}, params)
        try:
            while engine.has_unfinished_requests():
                before_step()
                for output in engine.step():
                    if not output.finished:
                        continue
                    answer = output.outputs[0]
                    yield Response(
                        index=numbers.pop(output.request_id),
                        ids=np.asarray(answer.token_ids, dtype=np.int32),
                        logprobs=np.asarray(answer.logprobs.logprobs, dtype=np.float32),
                        truncated=answer.finish_reason == "length",
                    )
        finally:
            if numbers:
                engine.abort_request(list(numbers))

    def load(self, path: str) -> None:
        """Replace the weights by those of another model of the same shape, from disk, unless they are."""
        if path != self._path:
            self._path = ""
            storage.fetch(Path(path))
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            self._forget_old_weights()
            self._path = path

    def sleep(self) -> None:
        """Leave the device to another: cache and weights are gone, so that the engine is stale until it is synced."""
        if not all(self._asleep.values()):
            self.wake(*self._asleep)  # half awake, an engine cannot go to sleep
            self.version, self._path = 0, ""
            self.llm.sleep(level=2)
            self._asleep = dict.fromkeys(self._asleep, True)

    def wake(self, *parts: str) -> None:
        """Take the device back for these parts, `weights` or `kv_cache`; the weights are no weights before a sync."""
        for part in parts:
            if self._asleep[part]:
                self.llm.wake_up([part])
                self._asleep[part] = False

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        self.llm.reset_prefix_cache()

    def _forget_old_weights(self) -> None:
        self.llm.collective_rpc("refresh_tied_head")
        self.forget_prefixes()

    # -- weight transfer, driven by the learners' rank 0 --------------------------------------------------------

    def init_weight_transfer(self, payload: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": payload})

    def start_weight_update(self) -> None:
        self.version, self._path = 0, ""  # some weights old, some new, until all are there
        self.llm.collective_rpc("start_digest")
        self.llm.start_weight_update()

    def update_weights(self, payload: Any) -> None:
        self.llm.update_weights({"update_info": payload})

    def finish_weight_update(self, version: int) -> list[int]:
        """The new weights are whole: forget what the old ones computed, and say whose they are.

        Returns a digest of what each worker was given.
        """
        self.llm.finish_weight_update(str(version))
        self._forget_old_weights()
        self.version = version
        return list(self.llm.collective_rpc("finish_digest"))


