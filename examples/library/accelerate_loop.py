"""Hugging Face accelerate around a model of the transformers library that colrow has split.

    pip install accelerate
    torchrun --nproc-per-node 2 examples/library/accelerate_loop.py

accelerate owns the mesh and the data: with `tp_size` it gives every rank of a tp group the same batches. It takes a
model whose parameters are DTensors as it is, and clips and steps as usual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import colrow

VOCAB, TOKENS, BATCH = 512, 32, 8


class Rows(Dataset[Tensor]):
    """Token ids [TOKENS + 1], counted up in threes from a random start."""

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, i: int) -> Tensor:
        start = torch.randint(0, VOCAB, (1,), generator=torch.Generator().manual_seed(i))
        return (start + 3 * torch.arange(TOKENS + 1)) % VOCAB


def build_model() -> nn.Module:
    """A small Qwen3: norms on queries and keys, whose gradients a plan has to sum over tp."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )


def train(tp: int, steps: int = 20) -> list[float]:
    """The losses of `steps` steps. Every process of the run calls it."""
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig

    accelerator = Accelerator(parallelism_config=ParallelismConfig(tp_size=tp))
    mesh = accelerator.torch_device_mesh["tp"]
    model = build_model()
    plan = colrow.Plan.derive(model, tp=tp)
    findings = colrow.check(model, plan, colrow.Mesh(tp=tp), batch_size=BATCH, seq_len=TOKENS)
    if any(finding.severity == "error" for finding in findings):
        raise SystemExit("\n".join(map(str, findings)))
    colrow.parallelize(model.to(accelerator.device), plan, mesh)
    model._tp_size = tp  # by which accelerate knows a model that is split already

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(Rows(), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _, rows in zip(range(steps), loader, strict=False):
        with colrow.loss_context(plan, mesh):
            logits = model(rows[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    import os

    from accelerate import PartialState

    losses = train(tp=int(os.environ["WORLD_SIZE"]))
    if PartialState().is_main_process:
        for step, loss in enumerate(losses):
            print(f"step {step} loss {loss:.4f}")


if __name__ == "__main__":
    main()
