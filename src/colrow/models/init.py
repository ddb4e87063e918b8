"""Initial values: those of a weight depend on the seed and its name only.

Each number is a pure function of (seed, name, index in the global tensor), so a rank computes the region that it holds
and nothing else, and every mesh starts from the same bits. A `torch.Generator` cannot give that: it fills a tensor in
order, and on a GPU its order depends on the number of multiprocessors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from colrow.errors import ConfigError

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 25}
"""Elements computed at a time, 24 bytes of temporaries each: on a CPU they stay in a core's cache, on a GPU they are
enough to fill it."""


def init_tensor(
    name: str,
    shape: Sequence[int],
    seed: int,
    device: torch.device | str,
    config: Any,
    *,
    offset: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
) -> Tensor:
    """The fp32 initial value of the parameter `name` of global shape `shape`, or its region of `size` at `offset`.

    Matrices are normal with the std `config.initializer_range` (0.02 where the config has none), those that write into
    the residual stream (o_proj, down_proj) with that / sqrt(2 layers) (GPT-2, section 2.3), the embedding with
    `config.embedding_range` if there is one; norms are 1, biases 0. `config` has `num_hidden_layers`.

    Raises:
        ConfigError: there is no rule for a parameter of this name and shape.
    """
    offset = [0] * len(shape) if offset is None else offset
    size = shape if size is None else size
    module, _, leaf = name.rpartition(".")
    module_name = module.rpartition(".")[2]
    if leaf == "bias":
        return torch.zeros(*size, device=device)
    if leaf == "weight" and len(shape) == 1 and "norm" in module_name:
        return torch.ones(*size, device=device)
    # A rank fills its own region: values are a function of seed, name and global index, so every mesh starts equal.
    if leaf == "weight" and len(shape) == 2:
        std: float = getattr(config, "initializer_range", 0.02)
        if module_name in ("o_proj", "down_proj"):
            std /= math.sqrt(2 * config.num_hidden_layers)
        elif module_name == "embed_tokens":
            std = getattr(config, "embedding_range", None) or std
        return _normal(_key(seed, name), shape, offset, size, device) * std
    raise ConfigError(
        f"no rule gives an initial value to {name} of shape {tuple(shape)}: known are biases, the weights of norms, "
        "and matrices; start from a folder of weights instead"
    )


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _normal(
    key: int, shape: Sequence[int], offset: Sequence[int], size: Sequence[int], device: torch.device | str
) -> Tensor:
    """Standard normal numbers for a region of a matrix: index -> hashed 64 bits -> uniform -> inverse of the CDF."""
    out = torch.empty(*size, device=device)
    columns = torch.arange(offset[1], offset[1] + size[1], device=device)
    # in blocks of rows: each number is a function of its own index, so the block size does not change the result
    step = max(1, _CHUNK.get(torch.device(device).type, 1 << 16) // max(1, size[1]))
    for row in range(0, size[0], step):
        rows = torch.arange(offset[0] + row, offset[0] + min(row + step, size[0]), device=device)
        bits = _mix(rows[:, None] * shape[1] + columns, key)  # indices into the global matrix, whatever the region
        uniform = ((bits >> 11).double() + 0.5) * 2.0**-52  # 53 signed bits -> (-1, 1), both ends left out
        out[row : row + step] = torch.erfinv(uniform) * math.sqrt(2.0)
    return out


def _mix(index: Tensor, key: int) -> Tensor:
    """SplitMix64 (Steele, Lea, Flood 2014): 64 well mixed bits for each index; products wrap around."""
    z = index.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = z.bitwise_xor_(_shift_right(z, shift)).mul_(_signed(factor))
    return z.bitwise_xor_(_shift_right(z, 31))


def _shift_right(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # torch shifts in copies of the sign


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
