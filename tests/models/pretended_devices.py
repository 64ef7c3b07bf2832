"""Run by test_spread.py in a process of its own: models spread over devices that are not there.

PyTorch can pretend to compute: tensors have shapes and devices but no numbers, and an operation on tensors of two
devices fails as it would on GPUs. Prints, for each case, where every layer is, and where the outputs are.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_ray.core.ragged import PackedRows, pack
from rlhf_ray.models import modules, spread

PRETEND = FakeTensorMode(allow_non_fake_inputs=True)


def apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which cannot replace tensors without numbers."""
    for part in module.children() if recurse else ():
        part._apply(fn)
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            moved = fn(tensor if isinstance(tensor, FakeTensor) else PRETEND.from_tensor(tensor))
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(moved, requires_grad=False)
            else:
                module._buffers[name] = moved
    return module


def places(case: dict[str, Any]) -> dict[str, Any]:
    """case: a model's configuration, how many devices, and whether three sequences share their prompt."""
    config = AutoConfig.for_model(**case["config"])
    scalar = modules.ScalarModel(AutoModelForSequenceClassification.from_config(config))
    policy = modules.CausalLM(AutoModelForCausalLM.from_config(config))
    devices = [torch.device("pretended", i) for i in range(case["devices"])]
    prompts = np.array([4, 4, 4]) if case["shared"] else None
    (rows,) = pack(np.tile(np.arange(12), 3), np.full(3, 12), 64, 64, prompts=prompts)
    with PRETEND, torch.no_grad():
        rows = PackedRows(*(None if x is None else PRETEND.from_tensor(x).to(devices[0])
                            for x in (rows.ids, rows.positions, rows.index, rows.links)))
        for model in (scalar, policy):
            spread.spread(model, devices)
        states = modules._hidden_states(policy.model.eval(), rows)
        return {
            "layers": [next(part.parameters()).device.index for part in scalar.modules()
                       if type(part).__name__ in modules.layer_classes(scalar)],
            "outputs": [str(scalar.eval()(rows).device), str(states.device), str(policy.model.lm_head.weight.device)],
        }


if __name__ == "__main__":
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("pretended")
    nn.Module._apply = apply  # type: ignore[method-assign]
    print(json.dumps([places(case) for case in json.load(sys.stdin)]))
