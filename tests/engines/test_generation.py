import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config.schema import GeneratorConfig, ModelConfig
from rlhf_ray.engines.generation import GenerationEngine, Request, Response, cache_limit, kv_cache_bytes
from rlhf_ray.errors import UserError

LLAMA = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 4,
         "num_key_value_heads": 2}


def found(tmp_path, config, limit_gib=1, **engine):
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(path=str(tmp_path), max_length=100, dtype=engine.pop("dtype", "float32"))
    return kv_cache_bytes(str(tmp_path), model, GeneratorConfig(**engine), limit_gib * 2**30)


def test_room_for_all_sequences_at_full_length_and_a_block_more_each(tmp_path):
    per_token = 2 * 3 * 2 * 32 * 4  # keys and values, layers, heads, places of a head, bytes
    assert found(tmp_path, LLAMA, max_num_seqs=7) == per_token * 8 * (128 + 128)


def test_half_of_it_in_bfloat16(tmp_path):
    assert 2 * found(tmp_path, LLAMA, dtype="bfloat16") == found(tmp_path, LLAMA)


def test_never_above_the_limit(tmp_path):
    assert found(tmp_path, LLAMA | {"hidden_size": 65536}, max_num_seqs=1000, limit_gib=2) == 2 * 2**30


@pytest.mark.parametrize("config", [{"model_type": "mamba", "hidden_size": 128}])
def test_the_limit_where_the_shape_of_the_cache_is_not_known(tmp_path, config):
    assert found(tmp_path, config) == 2**30


def share_of_a_gpu(tmp_path, monkeypatch, gib, **engine):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 1000, "intermediate_size": 200}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=int(gib * 2**30)))
    model = ModelConfig(path=str(tmp_path), dtype="bfloat16")
    return cache_limit(str(tmp_path), model, GeneratorConfig(gpu_memory_utilization=0.5, **engine))


def test_an_engine_among_others_on_a_gpu_has_room_for_its_cache_beside_its_weights(tmp_path, monkeypatch):
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 200 + 2 * 128  # attention with half as many keys, mlp, norms
    weights = 2 * (2 * 1000 * 128 + 3 * layer + 128)
    share = 4 * 2**30
    assert share_of_a_gpu(tmp_path, monkeypatch, 8, gpus=0.6) == share - weights - share // 10 - 2**30


def test_an_engine_with_a_gpu_of_its_own_finds_out_by_itself(tmp_path, monkeypatch):
    assert share_of_a_gpu(tmp_path, monkeypatch, 8, gpus=1) is None


def test_a_share_that_is_too_small_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"roles\.generator\.gpu_memory_utilization=0\.5 is 1\.0 GiB of this GPU"):
        share_of_a_gpu(tmp_path, monkeypatch, 2, gpus=0.6)


# -- sampling that nobody wants any more. vLLM's engine is played by a few lines here ----------------------------------


class Engine:
    """One request ends with each step. under_way: their names."""

    def __init__(self) -> None:
        self.under_way: list[str] = []

    def add_request(self, name: str, *_: Any) -> None:
        self.under_way.append(name)

    def has_unfinished_requests(self) -> bool:
        return bool(self.under_way)

    def step(self) -> list[Any]:
        answer = SimpleNamespace(token_ids=[7], logprobs=SimpleNamespace(logprobs=[-0.5]), finish_reason="stop")
        return [SimpleNamespace(request_id=self.under_way.pop(0), finished=True, outputs=[answer])]

    def abort_request(self, names: list[str]) -> None:
        self.under_way = [name for name in self.under_way if name not in names]


def engine() -> tuple[GenerationEngine, Engine]:
    made, inner = GenerationEngine.__new__(GenerationEngine), Engine()
    made.llm, made._requests = SimpleNamespace(llm_engine=inner), 0
    return made, inner


def sampling(made: GenerationEngine, before_step: Callable[[], object] = lambda: None) -> Iterator[Response]:
    return made.sample([Request([5], seed) for seed in range(3)], 1.0, 8, before_step)


def test_what_is_under_way_is_dropped_with_the_iterator_and_the_next_begins_afresh() -> None:
    """It would go on beside the next, whose answers nobody could tell apart."""
    made, inner = engine()
    responses = sampling(made)
    assert next(responses).index == 0 and inner.under_way == ["2", "3"]
    responses.close()  # type: ignore[attr-defined]
    assert inner.under_way == []
    assert [response.index for response in sampling(made)] == [0, 1, 2]


def test_so_it_is_when_somebody_objects_between_two_steps() -> None:
    made, inner = engine()
    wanted = iter([True, True, False])

    def before_step() -> None:
        if not next(wanted):
            raise KeyboardInterrupt

    responses = sampling(made, before_step)
    assert [next(responses).index, next(responses).index] == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        next(responses)
    assert inner.under_way == []
