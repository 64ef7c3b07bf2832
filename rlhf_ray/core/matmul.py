"""Products of matrices on CPU by oneDNN, which PyTorch has beside MKL and asks only for bfloat16.

In float32 it is as exact, and where MKL does not use the AVX-512 that is there (AMD's processors) twice as fast. With
AVX2 alone MKL is ahead, by about a fifth of a training step (benchmarks/README.md).
"""

import torch
from torch import Tensor

_ONEDNN = (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
           and torch.backends.cpu.get_cpu_capability().startswith("AVX512"))


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a [..., k] and b [n, k], which may be views of their transposes, to a @ b.T [..., n]. It has no gradient."""
    if _ONEDNN and a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and a.numel() and b.numel():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return a @ b.T
