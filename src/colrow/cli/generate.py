"""`colrow generate RUN_OR_EXPORT --prompt TEXT`: text that continues a prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from colrow.cli.flags import parse
from colrow.errors import ConfigError

if TYPE_CHECKING:  # a wrong flag need not wait for torch
    import torch

    from colrow.cli.loading import SavedModel


@dataclass(frozen=True)
class Flags:
    """Sample text from a run or an export.

    A model that does not fit one GPU is split over several: torchrun --nproc-per-node 4 -m colrow generate ...
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_EXPORT")]
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
    import torch
    import torch.distributed as dist

    from colrow.cli.loading import open_saved, torchrun_ranks
    from colrow.models.generate import generate
    from colrow.parallel.outputs import main_tensor

    device = _device(flags.device)
    with torchrun_ranks("nccl" if device.type == "cuda" else "gloo") as ranks:
        saved = open_saved(flags.source, flags.step, flags.trust_code)
        _load(saved, ranks, device)
        model, tokenizer = saved.model.eval(), saved.tokenizer

        # each document of the training text began after another's end
        prompt = replace(tokenizer, special=flags.special).encode(flags.prompt) or [tokenizer.eos_id]
        # a lookup past the embedding ends a GPU process with an assertion of the device, which names nothing
        size = getattr(getattr(model, "config", None), "vocab_size", None)
        if isinstance(size, int) and max(prompt) >= size:
            raise ConfigError(
                f"the prompt has token {max(prompt):,}, and the model's vocabulary is {size:,}: is the tokenizer in "
                f"{flags.source} the model's?"
            )
        ids = generate(
            lambda ids: main_tensor(model(ids)),  # as in training: a model may return more than logits
            torch.tensor([prompt], device=device),
            flags.tokens,
            temperature=flags.temperature,
            top_k=flags.top_k,
            seed=flags.seed,
            pad_multiple=ranks,
            eos_id=tokenizer.eos_id,
            context=saved.context,
        )
        if ranks == 1 or dist.get_rank() == 0:
            print(tokenizer.decode(ids[0].tolist()))
    return 0


def _device(requested: str) -> torch.device:
    """This rank's device, made current. Raises ConfigError where a GPU is requested and there is none."""
    import os

    import torch

    visible = torch.cuda.is_available()
    if requested == "cuda" and not visible:
        raise ConfigError("device cuda is requested, and torch sees no GPU here: leave --device out")
    if requested == "cpu" or not visible:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _load(saved: SavedModel, ranks: int, device: torch.device) -> None:
    """Split the model over the ranks, and give it its stored weights in the dtype that it computes in."""
    import torch

    from colrow.mesh import Mesh
    from colrow.parallel.initialize import materialize
    from colrow.parallel.parallelize import parallelize

    model, compute = saved.model, torch.bfloat16 if device.type == "cuda" else torch.float32
    if saved.checkpoints is None:
        model.to(compute)  # weights are cast while they are read; a checkpoint is loaded in its own dtype
    if ranks > 1:
        parallelize(model, saved.plan(ranks), Mesh(tp=ranks).build(device.type, ranks))
    materialize(model, device)
    saved.load()
    model.to(compute)
