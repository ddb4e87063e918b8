"""`colrow export RUN -o DIR`: a run's weights as a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from colrow.cli.flags import parse


@dataclass(frozen=True)
class Flags:
    """Write a run's weights as a Hugging Face folder: safetensors, config.json, generation_config.json, tokenizer.

    A model that does not fit one process is written by several: torchrun --nproc-per-node 4 -m colrow export ...
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The folder to write; a previous export is replaced."""
    step: int | None = None
    """Of the checkpoint; the newest complete one unless given."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the written weights; unless given the run's export.dtype, or that of the folder that its weights came from, or
    float32."""
    max_shard_gb: Annotated[float, Field(gt=0.0, le=1e9)] = 5.0
    """A file holds at most this many gigabytes (10^9 bytes)."""
    trust_code: bool = False
    """Run the Python code that the folder of a run made by somebody else names for its model."""


def main(argv: list[str]) -> int:
    """Exit 0; 2 for bad usage or input."""
    flags = parse(Flags, "export", argv)
    from torch.distributed.device_mesh import init_device_mesh

    from colrow.checkpoint.export import export
    from colrow.checkpoint.folder import format_bytes
    from colrow.cli.loading import open_saved, torchrun_ranks
    from colrow.parallel.initialize import materialize, shard_evenly

    with torchrun_ranks("gloo") as ranks:
        saved = open_saved(flags.run, flags.step, flags.trust_code)
        config = saved.config
        # The ranks divide the memory alone: each holds a shard of every parameter, by no plan, and computes nothing.
        if ranks > 1:
            shard_evenly(saved.model, init_device_mesh("cpu", (ranks,)))
        materialize(saved.model, "cpu")
        saved.load()
        dtype = saved.carried.dtype(flags.dtype or saved.dtype)
        read_back = export(
            saved.model,
            flags.output,
            config,
            saved.tokenizer,
            dtype=dtype,
            max_shard_bytes=int(flags.max_shard_gb * 1e9),
            carried=saved.carried,
            imports=True,  # the user waits for this verb alone: two seconds for transformers are well spent
        )
        if read_back is not None:
            size = sum(file.stat().st_size for file in flags.output.iterdir())
            at = "" if saved.step is None else f", step {saved.step}"
            in_dtype = str(dtype).removeprefix("torch.")
            print(f"exported {flags.run}{at} -> {flags.output} ({format_bytes(size)}, {in_dtype})")
            print(f"{'for transformers: ' if read_back.is_for_transformers else ''}{read_back}")
    return 0
