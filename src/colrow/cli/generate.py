"""`colrow generate RUN_OR_EXPORT --prompt TEXT`: text that continues a prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from colrow.cli.flags import parse


@dataclass(frozen=True)
class Flags:
    """Sample text from a run or an export.

    A model that does not fit one GPU is split over several: torchrun --nproc-per-node 4 -m colrow generate ...
    """

    source: tyro.conf.Positional[Path]
    """A run's folder, or a Hugging Face folder."""
    prompt: str
    """The text to continue; empty for a text from its beginning."""
    special: bool = False
    """Encode special tokens that the prompt spells, such as <|im_start|>, as these tokens."""
    tokens: int = 128
    """How many to sample, unless the text ends before."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only."""
    seed: int = 0
    """The same seed gives the same text."""
    step: int | None = None
    """Of a run's checkpoint; the newest complete one unless given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """CPUs compute in float32, GPUs in bfloat16."""
    trust_code: bool = False
    """Run the Python code that a model's folder, or a run made by somebody else, names for its model."""


def main(argv: list[str]) -> int:
    """Exit 0; 2 for bad usage or input."""
    flags = parse(Flags, "generate", argv)
    import os

    import torch
    import torch.distributed as dist
    from torch import Tensor

    from colrow.cli.loading import open_saved, torchrun_ranks
    from colrow.errors import ConfigError
    from colrow.mesh import Mesh
    from colrow.models.generate import generate
    from colrow.parallel.initialize import materialize
    from colrow.parallel.parallelize import parallelize

    on_gpu = torch.cuda.is_available() if flags.device == "auto" else flags.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError("device cuda is requested, and torch sees no GPU here: leave --device out")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    with torchrun_ranks("nccl" if on_gpu else "gloo") as ranks:
        saved = open_saved(flags.source, flags.step, flags.trust_code)
        model = saved.model
        compute = torch.bfloat16 if on_gpu else torch.float32
        if saved.checkpoints is None:
            model.to(compute)  # weights are cast while they are read; a checkpoint is loaded in its own dtype
        if ranks > 1:
            parallelize(model, saved.plan(ranks), Mesh(tp=ranks).build(device.type, ranks))
        materialize(model, device)
        saved.load()
        model.to(compute).eval()

        def logits_of(ids: Tensor) -> Tensor:
            out = model(ids)
            return getattr(out, "logits", out)  # models of transformers return more than logits

        # each document of the training text began after another's end
        tokenizer = replace(saved.tokenizer, special=flags.special)
        prompt = tokenizer.encode(flags.prompt) or [saved.tokenizer.eos_id]
        ids = generate(
            logits_of,
            torch.tensor([prompt], device=device),
            flags.tokens,
            temperature=flags.temperature,
            top_k=flags.top_k,
            seed=flags.seed,
            pad_multiple=ranks,
            eos_id=saved.tokenizer.eos_id,
            context=saved.context,
        )
        if ranks == 1 or dist.get_rank() == 0:
            print(saved.tokenizer.decode(ids[0].tolist()))
    return 0
