"""`transformers.Trainer` around a model that colrow has split.

    pip install accelerate
    torchrun --nproc-per-node 2 examples/library/trainer.py

Three things are not the Trainer's own: the loss and its backward stand in colrow's context; the Trainer is told that
the model's placement is settled, so that it is not wrapped in DDP; and the loader is a plain one, which gives every
rank the same batches (the Trainer's own would deal them out). The Trainer cannot save such a model's optimizer: save
with torch.distributed.checkpoint.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import colrow

VOCAB, TOKENS, BATCH = 512, 32, 8


class Rows(Dataset[dict[str, Tensor]]):
    """Token ids [TOKENS], counted up in threes; the model shifts the labels itself."""

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        start = torch.randint(0, VOCAB, (1,), generator=torch.Generator().manual_seed(i))
        ids = (start + 3 * torch.arange(TOKENS)) % VOCAB
        return {"input_ids": ids, "labels": ids}


class SplitTrainer(Trainer):
    """A Trainer whose model is parallel by `plan` on the tp axis of `mesh`."""

    def __init__(self, plan: colrow.Plan, mesh: DeviceMesh, **options: Any) -> None:
        self._plan, self._mesh = plan, mesh
        super().__init__(**options)
        self.is_distributed_loading_by_transformers = True  # the model is split already: it is not wrapped again

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_size=BATCH)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with colrow.loss_context(self._plan, self._mesh):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss.full_tensor() if isinstance(loss, DTensor) else loss


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def train(mesh: DeviceMesh, folder: str, steps: int = 20) -> list[float]:
    """The losses of `steps` steps. Every process of the run calls it."""
    tp = mesh["tp"].size()
    model = build_model()
    plan = colrow.Plan.derive(model, tp=tp)
    colrow.parallelize(model, plan, mesh)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=mesh.device_type == "cpu",
        disable_tqdm=True,
    )
    trainer = SplitTrainer(plan, mesh, model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("tp",))
    train(mesh, "runs/trainer")


if __name__ == "__main__":
    main()
