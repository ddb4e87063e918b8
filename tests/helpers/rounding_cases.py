"""Rounding to 8 bits on ragged shapes and both memory orders, against float64: the nearest number of the dtype by a
table of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from colrow.ops.float8 import ACTIVATION, GRADIENT
from colrow.ops.kernels.block_rounding import expanded
from colrow.ops.kernels.rounding import (
    HEADROOM,
    delayed_scale_reference,
    peak_of,
    round_reference,
    scale_reference,
)

Rounding = Callable[[Tensor, Tensor | None, bool], tuple[Tensor, Tensor, Tensor]]
"""(x, scale of x, gradient) -> rows, transposed, scale."""
SHAPES = [(1, 1), (33, 257), (272, 48), (16, 400), (64, 128), (128, 256), (256, 128), (384, 384)]


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of finite numbers within the dtype's range: ties to the even one."""
    table = torch.arange(256, dtype=torch.uint8, device=x.device).view(dtype).double()
    positive = table[:128][table[:128].isfinite()]  # ascending, as their bits are
    size = x.double().abs().contiguous()
    above = torch.searchsorted(positive, size).clamp(max=len(positive) - 1)
    below = (above - 1).clamp(min=0)
    up, down = positive[above] - size, size - positive[below]
    even = torch.where(above % 2 == 0, above, below)
    index = torch.where(up < down, above, torch.where(down < up, below, even))
    return positive[index] * torch.where(x < 0, -1.0, 1.0)


def scale_in_float64(peak: float, dtype: torch.dtype) -> float:
    """That of zeros is the smallest."""
    mantissa, exponent = math.frexp(peak / torch.finfo(dtype).max)
    power = math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent) if peak else 0.0
    return max(power, torch.finfo(torch.float32).tiny)


def inputs(device: str) -> Iterator[tuple[Tensor, bool]]:
    """Row-major and column-major, views of larger tensors, the largest value at a power of two among them."""
    generator = torch.Generator().manual_seed(0)
    for m, k in SHAPES:
        for source in (torch.bfloat16, torch.float32):
            for transposed in (False, True):
                around = torch.randn((k, m + 32) if transposed else (m, k + 32), generator=generator)
                around = (around * 10.0 ** (4 * torch.rand(around.shape, generator=generator) - 3)).to(source)
                x = around.to(device)[:, 16:-16]
                if transposed:
                    x = x.t()
                for gradient in (False, True):
                    yield x, gradient
    top = torch.full((128, 128), torch.finfo(ACTIVATION).max)
    for factor in (1.0, 1.0 - 2.0**-20, 1.0 + 2.0**-20, 0.0):
        yield (top * factor).to(device), False


def check(round_: Rounding, device: str) -> int:
    """Assert that a rounding is that of float64, in both orders; once more under a larger scale. The cases it took."""
    count = 0
    for x, gradient in inputs(device):
        dtype = GRADIENT if gradient else ACTIVATION
        rows, transposed, scale = round_(x, None, gradient)
        s = scale_in_float64(x.double().abs().max().item(), dtype)
        assert scale.item() == s, (x.shape, x.dtype, gradient, scale, s)
        want = nearest(x.double() / s, dtype)
        assert torch.equal(rows.double(), want), (x.shape, x.dtype, x.stride(), gradient)
        assert torch.equal(transposed.double(), want.t()), (x.shape, x.dtype, x.stride(), gradient)
        again, across, larger = round_(rows, 4 * scale, gradient)  # numbers of a fourth of the common scale
        assert larger.item() == 4 * s
        assert torch.equal(again.double(), nearest(want / 4, dtype)), x.shape
        assert torch.equal(across.double(), again.double().t()), x.shape
        count += 1
    return count


Delayed = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]
"""(x, history [4], gradient) -> rows, transposed, scale."""


def check_delayed(round_: Delayed, device: str, *, exact: bool = False) -> int:
    """Assert that scales follow from the last peak, that numbers beyond the range are cut off, and that the new peak is
    found: all as in float64. `exact`: on numbers that need no rounding, and are within the range: GPUs' conversion cuts
    off, Triton's interpreter's does not. The cases it took."""
    count = 0
    for x, gradient in inputs(device):
        dtype = GRADIENT if gradient else ACTIVATION
        own = scale_in_float64(x.double().abs().max().item(), dtype)
        if exact:
            values = (nearest(x.double() / own, dtype) * own).float()
            x = values if x.stride(1) == 1 else values.t().contiguous().t()
        peak, limit = x.double().abs().max().item(), torch.finfo(dtype).max
        # none known; numbers as large as they may be; 64 times as large, and a fourth of the last ones
        for last in (0.0, peak / HEADROOM[dtype], *([] if exact else [peak / 64, 4 * peak])):
            history = torch.tensor([last, peak / 2, torch.nan, torch.nan], device=device)
            last = history[0].item()  # as fp32 has it
            s = HEADROOM[dtype] * scale_in_float64(last, dtype) if last else scale_in_float64(peak, dtype)
            rows, transposed, scale = round_(x, history, gradient)
            assert scale.item() == s, (x.shape, x.dtype, gradient, last, scale, s)
            want = nearest((x.double() / s).clamp(-limit, limit), dtype)
            assert torch.equal(rows.double(), want), (x.shape, x.dtype, x.stride(), gradient, last)
            assert torch.equal(transposed.double(), want.t()), (x.shape, x.dtype, x.stride(), gradient, last)
            assert history[:2].tolist() == [last, peak], (x.shape, history, peak)
            count += 1
        larger = torch.tensor([0.0, 2 * peak + 1, 0.0, 0.0], device=device)
        round_(x, larger, gradient)
        assert larger[1] == torch.tensor(2 * peak + 1), "a smaller tensor of the same step changes no peak"
    return count


def delayed_by_reference(x: Tensor, history: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, transposed = _empty(x, gradient)
    scale = delayed_scale_reference(history, peak_of([x]), rows.dtype)
    round_reference(x, scale, None, rows, transposed, history)
    return rows, transposed, scale


def delayed_by_kernel(x: Tensor, history: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    from colrow.ops.kernels.rounding import peak_triton, round_triton

    rows, transposed = _empty(x, gradient)
    scale = torch.full((), torch.nan, device=x.device)
    round_triton(x, peak_triton([x], history), scale, None, rows, transposed, history=history)
    return rows, transposed, scale


def by_reference(x: Tensor, largest: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, transposed = _empty(x, gradient)
    scale = scale_reference(peak_of([x]), rows.dtype) if largest is None else largest
    round_reference(x, scale, None if largest is None else largest / 4, rows, transposed)
    return rows, transposed, scale


def by_kernel(
    x: Tensor, largest: Tensor | None, gradient: bool, values: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """With `values` in the place of x, once the largest of x is found."""
    from colrow.ops.kernels.rounding import peak_triton, round_triton

    rows, transposed = _empty(x, gradient)
    scale, x_scale = torch.full((), torch.nan, device=x.device), None if largest is None else largest / 4
    peaks = peak_triton([x]) if largest is None or x_scale is None else torch.stack([x_scale, largest])
    round_triton(x if values is None else values, peaks, scale, x_scale, rows, transposed, given=largest is not None)
    return rows, transposed, scale


def by_interpreted_kernel(x: Tensor, largest: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """With numbers that need no rounding, which Triton's interpreter gets wrong: 1.97 becomes 1, not 2."""
    ratio = by_reference(x, None, gradient)[2].double() if largest is None else 4.0
    values = nearest(x.double() / ratio, GRADIENT if gradient else ACTIVATION) * ratio
    ordered = values if x.stride(1) == 1 else values.t().contiguous().t()
    return by_kernel(x, largest, gradient, ordered.to(torch.float32))


def _empty(x: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Both orders, all NaN, of which the transposed one is a slice of the columns of a larger one."""
    M, K = x.shape
    dtype = GRADIENT if gradient else ACTIVATION
    rows = torch.full((M, K), 255, dtype=torch.uint8, device=x.device)
    transposed = torch.full((K, M + 32), 255, dtype=torch.uint8, device=x.device)
    return rows.view(dtype), transposed[:, 16:-16].view(dtype)


def check_rows() -> int:
    """Assert that the interpreted kernel rounds each row as float64 does, on numbers as those above. The cases."""
    from colrow.ops.kernels.row_rounding import E4M3, round_rows_triton

    count = 0
    for x, gradient in inputs("cpu"):
        if gradient:
            continue  # the same tensor once more
        scales = [scale_in_float64(peak, E4M3) for peak in x.double().abs().amax(1).tolist()]
        s = torch.tensor(scales, dtype=torch.float64)[:, None]
        values = nearest(x.double() / s, E4M3) * s
        ordered = values if x.stride(1) == 1 else values.t().contiguous().t()
        y, found = torch.full(x.shape, torch.nan).to(E4M3), torch.full((len(x),), torch.nan)
        round_rows_triton(ordered.float(), y, found)
        assert found.double().tolist() == [scale_in_float64(v, E4M3) for v in ordered.abs().amax(1).tolist()], x.shape
        assert torch.equal(y.double() * found.double()[:, None], ordered), (x.shape, x.stride())
        count += 1
    return count


def block_inputs(m: int, k: int, device: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of seven powers of ten; each block has others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    of_blocks = 10.0 ** (6 * torch.rand(m, -(-k // 128), generator=generator) - 5)
    return (x * of_blocks.repeat_interleave(128, 1)[:, :k]).to(device, dtype)


def blocks_in_float64(x: Tensor, *, square: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The scale of each number, the rounded numbers, and what they stand for; blocks one by one."""
    s, x = torch.empty(x.shape, dtype=torch.float64, device=x.device), x.double()
    rows = 128 if square else 1
    for m in range(0, x.shape[0], rows):
        for k in range(0, x.shape[1], 128):
            block = slice(m, m + rows), slice(k, k + 128)
            s[block] = scale_in_float64(x[block].abs().max().item(), ACTIVATION)
    y = nearest(x / s, ACTIVATION)
    return s, y, y * s


BlockRounding = Callable[..., tuple[Tensor, Tensor]]


def wrong_blocks(round_: BlockRounding, device: str, *, exact: bool = False) -> int:
    """The cases in which a rounding by blocks is not that of float64: of both kinds of blocks, dtypes and orders, on
    views. `exact`: on numbers that need no rounding."""
    wrong = 0
    for m, k in ((128, 128), (256, 640), (48, 256), (16, 128)):
        for square in (False, True) if m % 128 == 0 else (False,):
            for dtype in (torch.bfloat16, torch.float32):
                x = block_inputs(m, k, device, m + k, dtype)
                if exact:
                    x = blocks_in_float64(x, square=square)[2].float()
                around = torch.zeros(m + 16, k + 16, dtype=x.dtype, device=device)
                around[8:-8, 8:-8] = x
                for view in (x, around[8:-8, 8:-8], x.t().contiguous().t()):
                    s, want, _ = blocks_in_float64(view, square=square)
                    y, scales = round_(view, square=square)
                    wrong += not torch.equal(expanded(scales, m, k).double(), s) or not torch.equal(y.double(), want)
    return wrong


def blocks_by_kernel(x: Tensor, *, square: bool) -> tuple[Tensor, Tensor]:
    from colrow.ops.kernels.block_rounding import round_blocks, round_blocks_triton

    y, scales = round_blocks(torch.zeros_like(x), square=square)  # memory of the kinds that are wanted
    round_blocks_triton(x, y, scales, square=square)
    return y, scales
