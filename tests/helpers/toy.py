"""A small model on any mesh, for tests that move its state: column, row, packed, uneven and replicated shards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from colrow.mesh import AXES, Mesh
from colrow.sharding.layout import Packed, full_tensor, mark_packed, packed_of

T = TypeVar("T")
WIDTH, LAYERS = 12, 2
QKV = Packed(0, (8, 4, 4))

MESHES = {
    "one": Mesh(),
    "tp2": Mesh(tp=2),
    "tp4": Mesh(tp=4),
    "shard2-tp2": Mesh(dp_shard=2, tp=2),
    "replicate2-tp2": Mesh(dp_replicate=2, tp=2),
    "pp2-tp2": Mesh(pp=2, tp=2),
    "replicate2-shard2": Mesh(dp_replicate=2, dp_shard=2),
    "replicate2-shard2-tp2": Mesh(dp_replicate=2, dp_shard=2, tp=2),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, sum(QKV.segments))
        self.odd = nn.Linear(WIDTH, 10)  # 10 rows: tp 4 gives 3, 3, 3, 1
        self.down = nn.Linear(8, WIDTH)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Toy(nn.Module):
    """Layers keep their numbers where a pipeline stage holds only some of them."""

    def __init__(self, layers: range = range(LAYERS)) -> None:
        super().__init__()
        if 0 in layers:
            self.embed_tokens = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleDict({str(i): Block() for i in layers})
        if LAYERS - 1 in layers:
            self.lm_head = nn.Linear(WIDTH, 20, bias=False)


@dataclass
class Placed:
    """A toy and its optimizer on the ranks of a mesh; other ranks hold nothing."""

    model: Toy | None
    optimizer: torch.optim.AdamW | None
    group: dist.ProcessGroup


def place(device: str, name: str, seed: int, lr: float = 1e-2) -> Placed:
    """Build the toy on the mesh `name` over the first ranks of the default group. Every rank calls this."""
    degrees = MESHES[name]
    mesh, group = mesh_of(device, name)
    if dist.get_rank() >= degrees.world_size:
        return Placed(None, None, group)
    torch.manual_seed(seed)
    model = _stage(Toy(), mesh["pp"]).to(device)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(torch.randn(tensor.shape))
    if degrees.tp > 1:
        _split(model, mesh["tp"])
    if degrees.dp > 1:
        both = degrees.dp_replicate > 1 and degrees.dp_shard > 1
        axes = ("dp_replicate", "dp_shard") if both else "dp_shard" if degrees.dp_shard > 1 else "dp_replicate"
        wrap = fully_shard if degrees.dp_shard > 1 else replicate
        for block in model.layers.values():
            wrap(block, mesh=mesh[axes])
        wrap(model, mesh=mesh[axes])
    plain = [p for n, p in model.named_parameters() if p.ndim == 1]
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return Placed(model, torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.9), foreach=False), group)


@cache
def mesh_of(device: str, name: str) -> tuple[DeviceMesh, dist.ProcessGroup]:
    """The mesh over the first ranks of the default group, and those ranks' own group; made once a process."""
    degrees = MESHES[name]
    members = torch.arange(degrees.world_size)
    mesh = DeviceMesh(device, members.view(degrees.degrees), mesh_dim_names=AXES)
    return mesh, gloo_group(members.tolist())


def gloo_group(ranks: list[int]) -> dist.ProcessGroup:
    """A gloo group of some of the ranks. Collective over the default group, which may be NCCL's.

    torch (2.11 to 2.13) has the ranks outside any new group take part in a split of the default group's NCCL
    communicator. Members of a gloo group split nothing, so the others would wait for ever.
    """
    with mock.patch.object(distributed_c10d, "_get_split_source", return_value=None):
        return dist.new_group(ranks, backend="gloo")


def train(placed: Placed, steps: int = 2) -> None:
    """Steps with gradients that depend on the weights alone, so that replicas stay replicas."""
    if placed.model is None or placed.optimizer is None:
        return
    for _ in range(steps):
        for param in placed.model.parameters():
            param.grad = param.detach().mul(0.37).sin()
        placed.optimizer.step()
        placed.optimizer.zero_grad()


def own_state(placed: Placed) -> dict[str, Tensor]:
    """The tensors of model and optimizer that this rank has a part of, whole; by means that checkpoints do not use."""
    mine: dict[str, Tensor] = {}
    if placed.model is not None and placed.optimizer is not None:
        for name, tensor in placed.model.state_dict(keep_vars=True).items():
            packed = packed_of(placed.model, name)
            mine[name] = full_tensor(tensor.detach(), packed).cpu()
            for key, value in placed.optimizer.state.get(tensor, {}).items():
                mine[f"optimizer.{name}.{key}"] = full_tensor(value, packed if value.ndim else None).cpu()
    return mine


def of_all_ranks(mine: dict[str, T]) -> dict[str, T]:
    """What the ranks have, in one."""
    parts: list[dict[str, T]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


def whole_state(placed: Placed) -> dict[str, Tensor]:
    """Every tensor of model and optimizer in full, on every rank."""
    return of_all_ranks(own_state(placed))


def _stage(model: Toy, pp: DeviceMesh) -> Toy:
    if pp.size() == 1:
        return model
    each, stage = LAYERS // pp.size(), pp.get_local_rank()
    return Toy(range(stage * each, (stage + 1) * each))


def _split(model: Toy, tp: DeviceMesh) -> None:
    for name, param in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if "qkv" in name:
            part = [s.chunk(tp.size())[tp.get_local_rank()] for s in param.detach().split(QKV.segments)]
            sharded = DTensor.from_local(torch.cat(part), tp, [Shard(0)], run_check=False)
            mark_packed(module, leaf, QKV)
        else:
            by_row = "norm" not in name and "down.bias" not in name
            dim = 1 if "down" in name else 0
            sharded = distribute_tensor(param.detach(), tp, [Shard(dim) if by_row else Replicate()])
        module.register_parameter(leaf, nn.Parameter(sharded))
