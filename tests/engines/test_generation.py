import json

import pytest

from rlhf_ray.config.schema import GeneratorConfig, ModelConfig
from rlhf_ray.engines.generation import kv_cache_bytes

LLAMA = {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 4,
         "num_key_value_heads": 2}


def found(tmp_path, config, limit_gib=1, **engine):
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(path=str(tmp_path), max_length=100, dtype=engine.pop("dtype", "float32"))
    return kv_cache_bytes(str(tmp_path), model, GeneratorConfig(kv_cache_gib=limit_gib, **engine))


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
