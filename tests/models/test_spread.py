"""A model over several devices: everything finds what it needs on its own, and the numbers are those of one device.

What is real here is the processor. On which device every operation would run is checked on pretended ones, see
`pretended_devices.py`.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.core.ragged import pack
from rlhf_ray.errors import UserError
from rlhf_ray.models.modules import CausalLM
from rlhf_ray.models.spread import own_streams, spread

SMALL = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
         "intermediate_size": 128, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 1}
FAMILIES = [
    {"model_type": "llama", "tie_word_embeddings": True}, {"model_type": "llama", "tie_word_embeddings": False},
    {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 2}, {"model_type": "gpt_neox"},
    {"model_type": "phi3"},
    {"model_type": "gemma2", "head_dim": 32, "num_key_value_heads": 2, "sliding_window": 8},
    {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 64},
]


def pretended(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where layers and outputs are; fails if an operation meets tensors of two devices."""
    script = Path(__file__).parent / "pretended_devices.py"
    done = subprocess.run([sys.executable, script], input=json.dumps(cases), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_whatever_the_model_inputs_come_to_the_layers_and_outputs_to_the_first_device():
    cases = [{"config": SMALL | family, "devices": 2, "shared": shared}
             for family in FAMILIES for shared in (False, True) if not (shared and family["model_type"] == "gemma2")]
    for case, found in zip(cases, pretended(cases), strict=True):
        assert found["layers"] == sorted(found["layers"]) and set(found["layers"]) == {0, 1}, case
        assert found["outputs"] == ["pretended:0"] * 3, case


def test_each_device_has_about_as_many_bytes():
    """A layer has 41,088 parameters: of eight, each of four devices has two, if embeddings are small. In the second
    case these are as large as four layers (2,568 x 64), and the first of three devices has nothing else."""
    config = SMALL | {"model_type": "llama", "num_hidden_layers": 8}
    equal, large = pretended([
        {"config": config, "devices": 4, "shared": False},
        {"config": config | {"vocab_size": 2_568}, "devices": 3, "shared": False}])
    assert equal["layers"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert large["layers"] == [1, 1, 1, 1, 2, 2, 2, 2]


def passes(model: CausalLM, device: torch.device) -> list[torch.Tensor]:
    """Log-probabilities of four micro-batches, two at a time."""
    rng = np.random.default_rng(0)

    def one(ids: np.ndarray) -> torch.Tensor:
        (rows,) = pack(ids, np.array([9, 7]), 16, 16)
        with torch.no_grad():
            result: torch.Tensor = model(rows.to(device), (rows.positions > 0).to(device), 0.7)
        return result.cpu()

    with ThreadPoolExecutor(2, initializer=lambda: device.type == "cpu" or own_streams([device, device])) as threads:
        return list(threads.map(one, [rng.integers(1, 100, 16) for _ in range(4)]))


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU here")])])
def test_the_numbers_are_those_of_one_device(kind):
    torch.manual_seed(0)
    whole = CausalLM(LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.3)).eval())
    expected = passes(whole, torch.device("cpu"))
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    spread(whole, [device, device])
    for one, other in zip(passes(whole, device), expected, strict=True):
        assert one == pytest.approx(other, abs=0 if kind == "cpu" else 1e-3)


def test_layers_that_share_keys_and_values():
    config = LlamaConfig(**SMALL)
    config.num_kv_shared_layers = 2  # as Gemma 3n's
    with pytest.raises(UserError, match="share keys and values"):
        spread(CausalLM(LlamaForCausalLM(config)), [torch.device("cpu")] * 2)


def test_fewer_layers_than_devices():
    model = CausalLM(LlamaForCausalLM(LlamaConfig(**SMALL)))
    with pytest.raises(UserError, match=r"4 layers cannot be spread over 5 GPUs: set .* roles\.reference\.gpus to 4"):
        spread(model, [torch.device("cpu")] * 5)
