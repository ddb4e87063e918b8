"""Hugging Face accelerate around a model of the transformers library that colrow has split.

    pip install accelerate
    torchrun --nproc-per-node 2 examples/library/accelerate_loop.py

accelerate starts the group of processes, runs backward, clips and steps. Two things stay here: `evaluation_mode`
keeps accelerate from wrapping the model in DDP, which cannot take DTensors, and the loader is not prepared, since
accelerate would deal different batches to the ranks of a tp group. (Its ParallelismConfig(tp_size=...) knows of such
groups, and takes GPUs only.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
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

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    mesh = init_device_mesh(accelerator.device.type, (tp,), mesh_dim_names=("tp",))
    model = build_model()
    plan = colrow.Plan.derive(model, tp=tp)
    findings = colrow.check(model, plan, colrow.Mesh(tp=tp), batch_size=BATCH, seq_len=TOKENS)
    if any(finding.severity == "error" for finding in findings):
        raise SystemExit("\n".join(map(str, findings)))
    colrow.parallelize(model.to(accelerator.device), plan, mesh)
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True).train()
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=3e-3))

    losses = []
    for _, batch in zip(range(steps), DataLoader(Rows(), batch_size=BATCH), strict=False):
        rows = batch.to(accelerator.device)
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
