"""Which kernel `scaled_dot_product_attention` runs, and the preference for the fast ones.

On an H200 at 8,192 tokens cuDNN's kernel takes half the time of torch's own flash kernel. `sdpa_kernel` with a list is
an allow-set unless `set_priority` is on: then the first kernel of the list that supports the inputs runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from colrow.torch_compat import attention_backend

PREFERRED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "math",
}


@contextmanager
def preferred_attention(device: torch.device) -> Iterator[None]:
    """Prefer cuDNN, then flash, on CUDA; elsewhere torch's choice stands."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(PREFERRED, set_priority=True):
        yield


def attention_kernel(
    device: torch.device, dtype: torch.dtype, *, heads: int, kv_heads: int, head_dim: int, seq_len: int
) -> str:
    """The name of the kernel that causal attention of these sizes runs under `preferred_attention`.

    Asked of torch's own selection with tensors of one sequence, `heads` being those of one rank.
    """
    q = torch.empty(1, heads, seq_len, head_dim, device=device, dtype=dtype, requires_grad=True)
    k = torch.empty(1, kv_heads, seq_len, head_dim, device=device, dtype=dtype, requires_grad=True)
    with preferred_attention(device):
        chosen = attention_backend(q, k, k, causal=True, grouped=heads != kv_heads)
    return _NAMES.get(SDPBackend(chosen), SDPBackend(chosen).name)
