"""What a CPU computes in a model, by what is fastest: linear layers by `core.matmul`, attention in float32."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_ray.core.matmul import times_transposed


class Linear(nn.Linear):
    """Takes over an nn.Linear in its place: `module.__class__ = Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        on_cpu = input.device.type == "cpu" and input.dtype == self.weight.dtype == torch.float32
        if not on_cpu or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        output: Tensor = _Product.apply(input, self.weight)
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return times_transposed(input, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        to_input = times_transposed(gradient, weight.T) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = times_transposed(gradient.reshape(-1, gradient.shape[-1]).T,
                                         input.reshape(-1, input.shape[-1]).T)
        return to_input, to_weight


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """transformers' `sdpa`; in bfloat16 PyTorch's backward pass of it takes five times as long as in float32."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        found: tuple[Tensor, Any] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    output, weights = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(query.dtype), weights


def speed_up(model: nn.Module) -> None:
    """Take over every plain linear layer, and `sdpa` attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("sdpa", _attention)
    # oneDNN keeps megabytes for each of the last 1,024 shapes it met, and of packed rows hardly any comes again. Those
    # of one micro-batch are enough, for all layers have the same. Both caches read this at the first product.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "16")
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
