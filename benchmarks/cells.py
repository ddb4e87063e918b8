"""Forecast cells, write that down, then measure them on this host's GPUs: the error of each forecast, and its choice.

    colrow calibrate -o calibrated.json
    python -m benchmarks.cells forecast -o forecast.json --gpu h200                     # by the shipped rates
    python -m benchmarks.cells forecast -o calibrated-forecast.json --gpu h200 --table calibrated.json
    python -m benchmarks.cells measure -o measured.json --budget 400
    python -m benchmarks.cells report forecast.json calibrated-forecast.json measured.json -o results.json

Cells are Llama 3 8B's width with 16 layers, unless their name says more; the most valuable come first. Those of four
GPUs are numbers 0 to 21 and 69, 70; those of eight are 71 to 91; the rest take two. A group's cells train the same
tokens in a step, so that they compete. The last eight wait for the CPU.
`--small` tries all of it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from colrow.bench.arms import arm_config
from colrow.config import RunConfig, parse_config
from colrow.forecasting.devices import device_named
from colrow.mesh import Mesh
from colrow.models.build import build_source
from colrow.models.shapes import SHAPES
from colrow.run.forecast_line import forecast_on
from colrow.run.preflight import choose_plan


@dataclass(frozen=True)
class Cell:
    """What is run.

    Args:
        group: cells of one name compete: the forecast chooses among them.
        mesh: as `tp2-dp_shard2`.
        sequences: of a micro-batch; micro_batches: of them in a step, on each data rank.
        changes: further keys of the config, as an arm has them.
    """

    group: str
    mesh: str
    arm: str
    sequences: int
    micro_batches: int = 1
    seq_len: int = 8192
    layers: int | None = 16
    recompute: str = "none"
    model: str = "llama3-8b"
    changes: str = ""

    @property
    def name(self) -> str:
        words = [
            self.group,
            self.mesh,
            self.arm + self.changes,
            f"{self.micro_batches}x{self.sequences}x{self.seq_len}",
        ]
        return " ".join([*words, *([self.recompute] if self.recompute != "none" else [])])

    def degrees(self) -> Mesh:
        axes = [part.rstrip("0123456789") for part in self.mesh.split("-")]
        return Mesh(**{axis: int(part[len(axis) :]) for axis, part in zip(axes, self.mesh.split("-"), strict=True)})

    def config(self, small: bool = False) -> RunConfig:
        mesh, seq_len = self.degrees(), self.seq_len // (64 if small else 1)
        model: dict[str, Any] = {"python": f"benchmarks.cells:{self.model}"}
        if self.model in SHAPES:
            model = {"shape": "laptop" if small else self.model, "layers": 4 if small else self.layers}
        tree = {
            "run": {"dir": "."},
            "model": model,
            "data": {"corpus": "random", "seq_len": seq_len},
            "mesh": mesh.model_dump(),
            "train": {
                "steps": 1,
                "warmup_steps": 0,
                "global_batch": self.sequences * self.micro_batches * mesh.dp,
                "micro_batch": self.sequences,
                "activation_checkpoint": self.recompute,
                "lr": 3e-4,
                "cuda_graph": False,
            },
            "forecast": "off",  # bench would forecast it once more, beside the GPUs
            "device": "cpu" if small else "cuda",
        }
        arm = "linear" if small and self.arm == "overlap" else self.arm
        return arm_config(parse_config(tree), arm + self.changes)


EDGES = (14848, 16384, 20480, 36608, 40960, 49152)
"""Tokens: of an H100 96% by the forecast, 2% too large, too large by far; of an H200 97%, 5% too large, by far."""
# fmt: off
TWO_GPUS = (
    Cell("8 layers, 8k", "tp2", "overlap", 2, layers=8),
    Cell("8 layers, 8k", "dp_shard2", "linear", 1, layers=8),
    Cell("1B, 2k", "tp2", "overlap", 16, 1, 2048, model="llama3.2-1b"),
    Cell("1B, 2k", "dp_shard2", "linear", 8, 1, 2048, model="llama3.2-1b"),
    Cell("16 layers, 4k", "tp2", "overlap", 4, 1, 4096),
    Cell("16 layers, 4k", "dp_shard2", "linear", 2, 1, 4096),
    Cell("Qwen3, 4k", "tp2", "config", 8, 1, 4096, model="qwen3", changes=":plan=derive"),
    Cell("Qwen3, 4k", "dp_shard2", "config", 4, 1, 4096, model="qwen3", changes=":plan=derive"),
    Cell("experts, 4k", "dp_shard2", "config", 2, 1, 4096, model="mixture", changes=":plan=derive"),
    Cell("experts, 4k", "dp_replicate2", "config", 2, 1, 4096, model="mixture", changes=":plan=derive"),
    Cell("16 layers, 8k recomputed", "tp2", "overlap", 4, recompute="full"),
    Cell("16 layers, 8k recomputed", "dp_shard2", "linear", 2, recompute="full"),
    Cell("16 layers, 8k recomputed", "pp2", "linear", 1, 4, recompute="full"),
    Cell("8 layers, 32k recomputed", "tp2", "overlap", 2, 1, 32768, 8, "full"),
    Cell("8 layers, 32k recomputed", "dp_shard2", "linear", 1, 1, 32768, 8, "full"),
    Cell("8 layers, 1k", "tp2", "overlap", 16, 1, 1024, 8),
    Cell("8 layers, 1k", "dp_shard2", "linear", 8, 1, 1024, 8),
    Cell("8 layers, 1k", "pp2", "linear", 4, 4, 1024, 8),
    Cell("1B, 16k", "tp2", "overlap", 2, 1, 16384, model="llama3.2-1b"),
    Cell("1B, 16k", "dp_replicate2", "linear", 1, 1, 16384, model="llama3.2-1b"),
    Cell("12 layers, 16k selective", "tp2", "overlap", 2, 1, 16384, 12, "selective"),
    Cell("12 layers, 16k selective", "dp_shard2", "linear", 1, 1, 16384, 12, "selective"),
    Cell("flat, 8 layers, 8k", "dp_shard2", "linear", 1, layers=8, changes=":mesh.data_engine=flat"),
    Cell("flat, 16 layers, 4k", "dp_shard2", "linear", 2, 1, 4096, changes=":mesh.data_engine=flat"),
    Cell("8 layers, 8k", "pp2", "linear", 1, 2, layers=8),
    Cell("8 layers, 8k", "dp_replicate2", "linear", 1, layers=8),
    Cell("1B, 2k", "dp_replicate2", "linear", 8, 1, 2048, model="llama3.2-1b"),
    Cell("experts, 4k", "tp2", "config", 4, 1, 4096, model="mixture", changes=":plan=derive"),
    Cell("16 layers, 4k", "pp2", "linear", 1, 4, 4096),
    Cell("1B, 16k", "dp_shard2", "linear", 1, 1, 16384, model="llama3.2-1b"),
    Cell("Qwen3, 4k", "dp_replicate2", "config", 4, 1, 4096, model="qwen3", changes=":plan=derive"),
    Cell("8 layers, 32k recomputed", "pp2", "linear", 1, 2, 32768, 8, "full"),
    Cell("1B, 2k", "pp2", "linear", 4, 4, 2048, model="llama3.2-1b"),
    Cell("8 layers, 1k", "dp_replicate2", "linear", 8, 1, 1024, 8),
    *(Cell("memory's edge, 16 layers", "dp_shard2", "linear", 1, 1, seq_len) for seq_len in EDGES),
)
FLAT = ":mesh.data_engine=flat:fsdp.gather=copy_engine:fsdp.exchange=copy_engine"
EIGHT_GPUS = (
    Cell("eight GPUs, 8k", "tp8", "overlap", 8),
    Cell("eight GPUs, 8k", "tp4-dp_shard2", "overlap", 4),
    Cell("eight GPUs, 8k", "tp2-dp_shard4", "overlap", 2),
    Cell("eight GPUs, 8k", "dp_shard8", "linear", 1),
    Cell("eight GPUs, 8k flat", "tp4-dp_shard2", "overlap", 4, changes=FLAT),
    Cell("eight GPUs, 8k flat", "tp2-dp_shard4", "overlap", 2, changes=FLAT),
    Cell("eight GPUs, 8k flat", "dp_shard8", "linear", 1, changes=FLAT),
    Cell("eight GPUs, 8k recomputed", "tp8", "overlap", 8, recompute="full"),
    Cell("eight GPUs, 8k recomputed", "tp4-dp_shard2", "overlap", 4, recompute="full"),
    Cell("eight GPUs, 8k recomputed", "tp2-dp_shard4", "overlap", 2, recompute="full"),
    Cell("eight GPUs, 32k recomputed", "tp8", "overlap", 4, 1, 32768, recompute="full"),
    Cell("eight GPUs, 32k recomputed", "tp4-dp_shard2", "overlap", 2, 1, 32768, recompute="full"),
    Cell("eight GPUs, 32k recomputed", "tp2-dp_shard4", "overlap", 1, 1, 32768, recompute="full"),
    Cell("eight GPUs, 32k", "tp8", "overlap", 4, 1, 32768),
    Cell("eight GPUs, 32k", "tp4-dp_shard2", "overlap", 2, 1, 32768),
    Cell("eight GPUs, 32k", "tp2-dp_shard4", "overlap", 1, 1, 32768),
    Cell("eight GPUs, 32 layers", "tp8", "overlap", 4, layers=32),
    Cell("eight GPUs, 32 layers", "tp4-dp_shard2", "overlap", 2, layers=32),
    Cell("eight GPUs, 32 layers", "tp2-dp_shard4", "overlap", 1, layers=32),
    Cell("eight GPUs, experts", "dp_shard8", "config", 1, model="mixture", changes=":plan=derive"),
    Cell("eight GPUs, 8k", "pp2-tp4", "overlap", 2, 4),
)
EIGHT, LONG, FULL = "8k", "32k", "8k recomputed"
CPU_PACED = (
    Cell("1B, 1k", "tp2", "plain", 8, 1, 1024, None, model="llama3.2-1b"),
    Cell("1B, 1k", "tp2", "fast", 8, 1, 1024, None, model="llama3.2-1b"),
    Cell("1B, 1k", "tp2", "overlap", 8, 1, 1024, None, model="llama3.2-1b"),
    Cell("1B, 1k", "dp_shard2", "linear", 4, 1, 1024, None, model="llama3.2-1b"),
    Cell("1B, 1k", "dp_shard2", "linear", 4, 1, 1024, None, model="llama3.2-1b", changes=":mesh.data_engine=flat"),
    Cell("1B, 1k", "tp2", "plain", 8, 1, 1024, None, model="llama3.2-1b", changes=":train.compile=false"),
    Cell("8 layers, 1k, few", "tp2", "plain", 1, 1, 1024, 8),
    Cell("8 layers, 1k, few", "tp2", "overlap", 1, 1, 1024, 8),
)
CELLS = (
    Cell(EIGHT, "tp4", "overlap", 4),
    Cell(EIGHT, "tp2-dp_shard2", "overlap", 2),
    Cell(EIGHT, "dp_shard4", "linear", 1),
    Cell(EIGHT, "pp2-tp2", "overlap", 1, 4),
    Cell("8k flat", "tp2-dp_shard2", "overlap", 2, changes=":mesh.data_engine=flat"),
    Cell("8k flat", "dp_shard4", "linear", 1, changes=":mesh.data_engine=flat"),
    Cell(LONG, "tp4", "overlap", 2, seq_len=32768),
    Cell(LONG, "tp2-dp_shard2", "overlap", 1, seq_len=32768),
    Cell(FULL, "tp4", "overlap", 4, recompute="full"),
    Cell(FULL, "tp2-dp_shard2", "overlap", 2, recompute="full"),
    Cell(FULL, "dp_shard4", "linear", 1, recompute="full"),
    Cell("experts", "dp_shard4", "config", 1, model="mixture", changes=":plan=derive"),
    Cell(EIGHT, "dp_replicate2-tp2", "overlap", 2),
    Cell(LONG, "pp2-tp2", "overlap", 1, 2, seq_len=32768),
    Cell("32k recomputed", "tp2-dp_shard2", "overlap", 1, seq_len=32768, recompute="full"),
    Cell("32k recomputed", "dp_shard4", "linear", 1, seq_len=32768, recompute="full"),
    Cell("plain", "tp4", "plain", 4),
    Cell("plain", "tp2-dp_shard2", "linear", 2),
    Cell("kept weights", "tp2-dp_shard2", "overlap", 2, changes=":fsdp.reshard_after_forward=false"),
    Cell("32 layers", "tp2-dp_shard2", "overlap", 2, layers=32),
    Cell("32 layers", "tp4", "overlap", 2, layers=32),
    Cell("8k selective", "tp4", "overlap", 4, recompute="selective"),
    Cell("two GPUs, 8k", "tp2", "overlap", 2),
    Cell("two GPUs, 8k", "dp_shard2", "linear", 1),
    Cell("two GPUs, 8k flat", "dp_shard2", "linear", 1, changes=":mesh.data_engine=flat"),
    Cell("two GPUs, experts", "dp_shard2", "config", 1, model="mixture", changes=":plan=derive"),
    Cell("two GPUs, 32k", "tp2", "overlap", 1, seq_len=32768),
    Cell("two GPUs, 32k", "dp_shard2", "linear", 1, seq_len=32768, recompute="full"),
    Cell("two GPUs, 8k recomputed", "tp2", "overlap", 2, recompute="full"),
    *TWO_GPUS,
    Cell("8k flat", "tp2-dp_shard2", "overlap", 2, changes=FLAT),
    Cell("8k flat", "dp_shard4", "linear", 1, changes=FLAT),
    *EIGHT_GPUS,
    *CPU_PACED,
)
# fmt: on


def mixture() -> nn.Module:
    """Four layers of a mixture of 32 experts, 8 of them for a token; 0.9 billion parameters."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=32768, hidden_size=2048, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, num_experts=32, num_experts_per_tok=8, moe_intermediate_size=768, max_position_embeddings=32768,
        use_cache=False,
    )  # fmt: skip
    return _filled(Qwen3MoeForCausalLM, config)


def _filled(architecture: Any, config: Any) -> nn.Module:
    """The model with one vector of random numbers, repeated."""
    with torch.device("meta"):
        model = architecture(config)
    model = model.to_empty(device="cpu")
    drawn = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))  # to draw all takes half a minute
    with torch.no_grad():
        for name, param in model.named_parameters():
            count = param.numel()
            values = drawn.repeat(count // drawn.numel() + 1)[:count].view_as(param)
            param.copy_(torch.ones_like(param) if "norm" in name else values)
        model.model.rotary_emb.__init__(config)  # its buffers were empty
    return model


def qwen3() -> nn.Module:
    """Twelve layers of Qwen3-1.7B's width; 0.7 billion parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32768, hidden_size=2048, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=6144, max_position_embeddings=32768, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    return _filled(Qwen3ForCausalLM, config)


def forecast(cell: Cell, gpu: str, table: Path | None, per_host: int, small: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    start = time.time()
    entry: dict[str, Any] = {"name": cell.name}
    try:
        config = cell.config(small)
        model = build_source(config.model, config.run.seed).model
        row = forecast_on(device_named(gpu, table), per_host, config, model, choose_plan(config, model))
        entry |= {key: value for key, value in asdict(row).items() if key not in ("key", "fix")}
        entry["step_ms"] = sum(row.parts_ms.values())
    except Exception as error:
        entry["failure"] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return entry | {"at": _now(), "seconds": round(time.time() - start, 1)}


def forecast_all(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    source = device_named(options.gpu, options.table).source
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        jobs = [pool.submit(forecast, cell, options.gpu, options.table, 8, options.small) for cell in options.cells]
        for job in jobs:
            rows.append(job.result())
            _write(options.output, {"rates": source, "cells": rows})
    print(f"{len(rows)} forecasts by {source}")


def measure_all(options: argparse.Namespace) -> None:
    start, rows = time.monotonic(), []
    for cell in options.cells:
        left = options.budget - (time.monotonic() - start)
        if left < options.least:
            rows.append({"name": cell.name, "failure": "no time was left"})
            continue
        rows.append(measure(cell, min(left, options.limit), options.small))
        print(
            f"{time.monotonic() - start:.0f} s",
            {k: rows[-1].get(k) for k in ("name", "step_ms", "failure")},
            flush=True,
        )
        _write(options.output, {"cells": rows})


def measure(cell: Cell, limit: float, small: bool) -> dict[str, Any]:
    """One process for each rank, by `colrow bench`."""
    entry: dict[str, Any] = {"name": cell.name, "started": _now()}
    with tempfile.TemporaryDirectory() as folder:
        config, output = Path(folder) / "cell.yaml", Path(folder) / "result.json"
        config.write_text(yaml.safe_dump(cell.config(small).model_dump(mode="json")), encoding="utf-8")
        words = [
            sys.executable,
            "-m",
            "colrow",
            "bench",
            str(config),
            "--arms",
            "config",
            "--warmup",
            "2",
            "--steps",
            "6",
        ]
        with subprocess.Popen([*words, "-o", str(output)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                text = process.communicate(timeout=limit)[0].decode(errors="replace")
            except subprocess.TimeoutExpired:
                process.terminate()
                text = process.communicate()[0].decode(errors="replace") + f"\nno end within {limit:.0f} s"
        if not output.exists():
            return entry | {"failure": text[-1500:]}
        result = json.loads(output.read_text(encoding="utf-8"))
        row = result["results"][0]
    trace = row.get("trace") or {}
    row["trace"] = {
        key: trace[key] for key in ("span", "busy", "idle", "communication", "exposed", "kinds") if key in trace
    }
    recomputed = f":train.activation_checkpoint={cell.recompute}" if cell.recompute != "none" else ""
    entry |= row | {"of": cell.group, "arm": cell.arm + cell.changes + recomputed}
    return entry | {"environment": result["environment"]}


def report(options: argparse.Namespace) -> None:
    """A table of errors for each forecast, and what it would have chosen."""
    *files, measured = (json.loads(Path(file).read_text(encoding="utf-8")) for file in options.files)
    seen = {row["name"]: row for row in measured["cells"]}
    groups = {cell.name: cell.group for cell in CELLS}
    rows = [{k: v for k, v in row.items() if k != "environment"} for row in measured["cells"]]
    environment = next((row["environment"] for row in measured["cells"] if "environment" in row), {})
    data: dict[str, Any] = {"environment": environment, "forecasts": files, "choices": []}
    data["results"] = [row for row in rows if "step_ms" in row]
    for file in files:
        wanted_of = {row["name"]: row for row in file["cells"]}
        print(f"\n{file['rates']}\n")
        print("| cell | tokens/s per GPU | forecast | error | allocated GiB | forecast | error |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        errors, memories = [], []
        for name, row in seen.items():
            there = wanted_of.get(name, {})
            if "step_ms" not in row or "step_ms" not in there:
                print(f"| {name} | {_reason(row)} | {_reason(there)} | | | | |")
                continue
            speed, wanted = row["tokens_per_second_per_gpu"], there["tokens_per_second_per_gpu"]
            memory, other = row.get("peak_allocated_gib") or float("nan"), there["allocated_gib"]
            errors.append(wanted / speed - 1)
            memories.append(other / memory - 1)
            figures = (
                f"{speed:,.0f} | {wanted:,.0f} | {errors[-1]:+.1%} | {memory:.2f} | {other:.2f} | {memories[-1]:+.1%}"
            )
            print(f"| {name} | {figures} |")
        if errors:
            print(f"\nspeed: median {statistics.median(map(abs, errors)):.1%}, most {max(map(abs, errors)):.1%}")
        for group in dict.fromkeys(groups.values()):
            both = {
                n: r
                for n, r in seen.items()
                if groups.get(n) == group and "step_ms" in r and "step_ms" in wanted_of.get(n, {})
            }
            if len(both) < 2:
                continue
            chosen = max(both, key=lambda n: wanted_of[n]["tokens_per_second_per_gpu"])
            best = max(both, key=lambda n: both[n]["tokens_per_second_per_gpu"])
            loss = 1 - both[chosen]["tokens_per_second_per_gpu"] / both[best]["tokens_per_second_per_gpu"]
            data["choices"].append(
                {"rates": file["rates"], "group": group, "chosen": chosen, "best": best, "behind": loss}
            )
            print(f"{group}: chosen {chosen}; best {best}; {loss:.1%} behind")
    if options.output is not None:
        _write(options.output, data)


def _reason(row: dict[str, Any]) -> str:
    if "step_ms" in row:
        return f"{row['tokens_per_second_per_gpu']:,.0f}"
    return str(row.get("failure", "none")).strip().rpartition("\n")[2][:80]


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _write(path: Path, data: Any) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(data) + "\n", encoding="utf-8")
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    of_forecast, of_measure, of_report = (verbs.add_parser(name) for name in ("forecast", "measure", "report"))
    for verb in (of_forecast, of_measure):
        verb.add_argument("--cells", type=int, nargs="+", default=range(len(CELLS)), help="their numbers, from 0")
        verb.add_argument("--small", action="store_true", help="a tiny model, on the CPU")
        verb.add_argument("-o", "--output", type=Path, required=True)
    of_forecast.add_argument("--gpu", default="h200")
    of_forecast.add_argument("--table", type=Path, help="what colrow calibrate wrote")
    of_forecast.add_argument("--workers", type=int, default=2)
    of_measure.add_argument("--budget", type=float, default=float("inf"), help="seconds for all cells")
    of_measure.add_argument("--limit", type=float, default=90.0, help="seconds for a cell")
    of_measure.add_argument("--least", type=float, default=20.0, help="start no cell with fewer seconds left")
    of_report.add_argument("files", nargs="+", help="forecasts, then measurements")
    of_report.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.verb != "report":
        options.cells = [CELLS[number] for number in options.cells]
    {"forecast": forecast_all, "measure": measure_all, "report": report}[options.verb](options)


if __name__ == "__main__":
    main()
