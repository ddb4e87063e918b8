"""SwiGLU and its gradient on ragged shapes against autograd in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from colrow.ops.kernels import swiglu
from helpers.parity import relative

SHAPES = [(1, 1), (3, 33), (17, 1024), (5, 2500)]


def worst_swiglu_error(device: str, dtype: torch.dtype, *, by_kernel: bool) -> float:
    """Relative, of y, the largest numbers of its rows, and the gradient. y is a slice of the columns of a larger
    tensor."""
    forward = swiglu.swiglu_triton if by_kernel else swiglu.swiglu_reference
    backward = swiglu.swiglu_gradient_triton if by_kernel else swiglu.swiglu_gradient_reference
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for T, f in SHAPES:
        for gate in (0, 1):
            y = (4 * torch.randn(T, 2 * f + 8, generator=generator)).to(device, dtype)[:, 4:-4]
            dh = torch.randn(T, f, generator=generator).to(device, dtype)
            exact = y.double().requires_grad_()
            a, b = exact.chunk(2, 1) if gate == 0 else exact.chunk(2, 1)[::-1]
            want = F.silu(a) * b
            want.backward(dh.double())
            h, peaks = forward(y, gate)
            assert torch.equal(peaks, h.abs().amax(1).to(peaks.dtype))
            worst = max(worst, relative(h, want.detach()), relative(backward(dh, y, gate), exact.grad))  # type: ignore[arg-type]
    return worst
