"""A model's layers over several devices of one process: for scorers whose model is larger than a device.

Hidden states walk from device to device. Micro-batches on threads with streams of their own (`own_streams`) keep the
devices busy side by side, as a pipeline does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import UserError


def spread(model: nn.Module, devices: Sequence[torch.device]) -> None:
    """Lay the layers of a Hugging Face model on the devices, in order, about as many bytes on each; all else, and what
    comes out, is on the first. Raises UserError if there are fewer layers than devices, or if layers share keys and
    values.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if len(layers) < len(devices):
        raise UserError(f"a {type(model).__name__} of {len(layers)} layers cannot be spread over {len(devices)} GPUs: "
                        f"set roles.reward.gpus and roles.reference.gpus to {len(layers) or 1} at most")
    if any(getattr(getattr(part, "config", None), "num_kv_shared_layers", 0) for part in model.modules()):
        raise UserError(f"the layers of this {type(model).__name__} share keys and values, and cannot be spread over "
                        "GPUs: set roles.reward.gpus and roles.reference.gpus to 1 at most")
    _keep(model, devices[0], without=set(layers))
    total = _bytes(model)
    before = total - sum(map(_bytes, layers))
    for layer in layers:
        own = _bytes(layer)
        place = min(len(devices) - 1, int((before + own / 2) * len(devices) / total))
        layer.to(devices[place]).register_forward_pre_hook(_bring_to(devices[place]), with_kwargs=True)
        before += own
    layers[-1].register_forward_hook(lambda _, __, output: moved(output, devices[0]))


def own_streams(devices: Sequence[torch.device]) -> None:
    """From here on this thread's work on the devices waits for no other thread's."""
    for device in reversed(devices):  # the last one that is named stays the current device
        torch.cuda.set_stream(torch.cuda.Stream(device))


def moved(value: Any, device: torch.device) -> Any:
    """The value with every tensor in it on the device; tuples, lists and dicts are looked into."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(x, device) for key, x in value.items()}
    return type(value)(moved(x, device) for x in value) if isinstance(value, tuple | list) else value


def _bring_to(device: torch.device) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return moved(args, device), moved(kwargs, device)

    return hook


def _keep(module: nn.Module, device: torch.device, without: set[nn.Module]) -> None:
    """Move a module to the device, but for some of the modules in it."""
    if module not in without:
        module._apply(lambda tensor: tensor.to(device), recurse=False)
        for part in module.children():
            _keep(part, device, without)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
