"""Train one model by each recipe of `train.fp8` beside bf16, on the same batches, on one GPU.

    python -m benchmarks.fp8_curves runs/fp8 --steps 500
    python benchmarks/curves.py --output curves-fp8 bf16=runs/fp8/bf16 again=runs/fp8/again \
        tensorwise=runs/fp8/tensorwise delayed=runs/fp8/delayed rowwise=runs/fp8/rowwise \
        blockwise=runs/fp8/blockwise

A llama of 8 layers reads the sources of Python's library, byte by byte. `bf16` and the recipes run `llama-fast` as a
rank of data axes does, and differ in their matmuls alone; `again` is bf16 with plain modules: the same sums in another
order, the yardstick. Each writes FOLDER/NAME/metrics.jsonl; figures.json has device, torch and seconds.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from colrow.config import parse_config
from colrow.models.llama import Llama, LlamaConfig
from colrow.ops.execution_record import clear, recorded
from colrow.ops.float8 import RECIPES
from colrow.parallel.compute_weights import ComputeWeights
from colrow.parallel.parallelize import style_on_one_rank
from colrow.parallel.random_state import Generators, MicroBatchSeeds
from colrow.plans.plan import Plan
from colrow.train.setup import build_step
from colrow.train.step import SingleStageModel
from colrow.train.weight_decay import decay_by_name, decaying_parameters

ARMS = {"bf16": "llama-fast", "again": "llama", **dict.fromkeys(RECIPES, "llama-fast")}


def corpus() -> torch.Tensor:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.from_numpy(np.frombuffer(b"".join(path.read_bytes() for path in paths), dtype=np.uint8).copy())


def run(
    name: str, options: argparse.Namespace, text: torch.Tensor, device: torch.device
) -> dict[str, float | list[str]]:
    clear()
    torch.manual_seed(0)
    heads, width = options.width // 64, options.width
    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=options.seq_len,
    )
    model = Llama(shape).to(device)
    train = {"steps": options.steps, "lr": 1e-3, "warmup_steps": options.steps // 10, "grad_clip": 1.0}
    config = parse_config(
        {
            "run": {"dir": "unused"},
            "model": {"shape": "laptop"},
            "data": {"corpus": "stdlib", "seq_len": options.seq_len},
            "train": {**train, "global_batch": options.batch, "micro_batch": options.batch, "compile": False},
        }
    )
    mesh = config.mesh.build(device.type, 1)
    plan = Plan.preset(ARMS[name], "linear")
    if name in RECIPES:
        plan = plan.with_fp8(name)
    style_on_one_rank(model, plan.resolve(model), mesh["tp"], data_axes=True)
    weights = ComputeWeights(model, torch.bfloat16)
    seeds = MicroBatchSeeds(Generators([model], device), 0)
    runner = SingleStageModel(model, plan, mesh, device, weights, seeds)
    decaying = decaying_parameters([model], decay_by_name(model, config.train))
    step = build_step(runner, config, mesh, decaying, seeds, [model])
    losses, start = [], time.perf_counter()
    for number in range(options.steps):
        generator = torch.Generator().manual_seed(number)
        at = torch.randint(len(text) - options.seq_len - 1, (options.batch, 1), generator=generator)
        ids = text[at + torch.arange(options.seq_len + 1)].to(device, torch.long)
        losses.append(step(number, [(ids[:, :-1], ids[:, 1:])])[0].detach())
    values = torch.stack(losses).tolist()
    folder = options.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"step": number + 1, "loss": loss}) + "\n" for number, loss in enumerate(values))
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return {"seconds": time.perf_counter() - start, "last_loss": values[-1], "fp8": recorded("fp8")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    for name, value in (("steps", 500), ("layers", 8), ("width", 768), ("seq-len", 512), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = dist.HashStore()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    found = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__}
    text, arms = corpus(), {}
    for name in options.arms:
        arms[name] = run(name, options, text, device)
        print(name, arms[name], flush=True)
        (options.folder / "figures.json").write_text(json.dumps({**found, "arms": arms}) + "\n", encoding="utf-8")
    for name in options.arms:
        wanted = [name] if name in RECIPES else []
        assert arms[name]["fp8"] == wanted, f"{name} ran {arms[name]['fp8']}"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
