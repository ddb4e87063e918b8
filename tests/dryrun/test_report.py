"""What a plan costs in collectives, counted; and what `colrow plan` prints."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from colrow.cli import main
from colrow.dryrun.report import repeated_block, report
from colrow.errors import PlanError
from colrow.models.llama import Llama
from colrow.plans.plan import Plan
from helpers.parity import MODELS

GATHER, SCATTER, REDUCE = "all_gather", "reduce_scatter", "all_reduce"
MEGATRON = {("forward", GATHER): 2, ("forward", SCATTER): 2, ("backward", GATHER): 2, ("backward", SCATTER): 2}
EXPECTED = {
    # two gathers and two reduce-scatters a layer, each way
    ("llama", "gqa"): MEGATRON,
    ("llama", "kv3"): MEGATRON,
    # and q, k and v gathered; backward keeps the rank's part of a whole gradient, which sends nothing, and what
    # o_proj's whole input gave back in parts is gathered
    ("article", "gqa"): MEGATRON | {("forward", GATHER): 5, ("backward", GATHER): 3},
}


@pytest.mark.parametrize(("preset", "name"), EXPECTED)
def test_collectives_of_one_layer(preset: str, name: str) -> None:
    with torch.device("meta"):
        model = Llama(MODELS[name])
    shown = report(model, Plan.preset(preset), tp=2, batch_size=2, seq_len=16)
    assert Counter((c.pass_, c.op) for c in shown.block_collectives) == EXPECTED[preset, name]
    assert {c.bytes for c in shown.block_collectives if c.where.endswith("mlp")} == {2 * 16 * 48 * 4}


def test_plan_prints_placements_and_one_block(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "laptop", "--tp", "2"]) == 0
    out = capsys.readouterr().out
    assert "layers.*.self_attn.k_proj.weight          64 × 128    shard(0)   32 × 128" in out
    assert "▼ all-gather 128 KiB  shard(1) → replicate  ▲ reduce-scatter 128 KiB" in out
    time = " ".join(out.partition("\ntime ")[2].partition("tokens/s")[0].split())
    total, parts = re.fullmatch(r"([\d.]+) ± [\d.]+ ms: (.*) ms [\d,]+", time).groups()  # type: ignore[union-attr]
    assert sum(float(part.split()[-1]) for part in parts.split(",")) == pytest.approx(float(total), abs=0.5)
    assert re.search(r"\nmemory [\d.]+ GiB of 79: CUDA and NCCL 2\.8", out)
    assert max(len(line) for line in out.splitlines()) <= 80


def test_a_reason_of_all_layers_stands_once() -> None:
    model, norm = Llama(MODELS["gqa"]), "layers.{}.input_layernorm.weight"
    assert len(model.layers) == 2
    same = {norm.format(i): "normalised over" for i in range(2)}
    differing = {norm.format(i): f"read at {i}" for i in range(2)}
    for notes, lines in ((same, 1), (differing, 2)):
        shown = report(model, replace(Plan.preset("llama"), notes=notes), tp=2, batch_size=1, seq_len=8)
        assert len(shown.notes) == lines
        assert shown.notes[0].startswith("layers.*.input_layernorm.weight: ")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(8))


def test_the_repeated_block_is_a_layer_and_not_one_of_its_experts() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(Experts() for _ in range(4))})
    assert repeated_block(model) == ("layers.*", 4)


def test_plan_as_json_and_as_a_file(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    file = f"{tmp_path}/plan.yaml"
    assert main(["plan", "laptop", "--tp", "2", "--json", "--gpu", "none", "-o", file]) == 0
    reported = json.loads(capsys.readouterr().out)
    row = next(r for r in reported["parameters"] if r["name"] == "layers.3.mlp.down_proj.weight")
    assert row == {
        "name": "layers.3.mlp.down_proj.weight",
        "shape": [128, 384],
        "placement": "shard(1)",
        "local_shape": [128, 192],
        "reason": "input features split",
    }
    assert {"op", "where", "pass", "bytes"} <= reported["collectives"][0].keys()
    assert reported["forecast"] is None
    assert Plan.load(file) == Plan.preset("llama")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["laptpo", "--tp", "2"], "no model is called 'laptpo'"),
        (["laptop", "--tp", "2", "--gpu", "h20"], "unknown GPU 'h20'; did you mean 'h200'?"),
        (["laptop", "--tp", "3"], "n_heads=8 is not divisible by tp=3: choose tp from 1, 2, 4, 8"),
        (["laptop", "--tp", "2", "--plan", "nowhere.yaml"], "there is no preset and no file 'nowhere.yaml'"),
    ],
)
def test_plan_names_what_is_wrong(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_that_the_model_does_not_run_under_is_an_error_of_the_plan() -> None:
    with torch.device("meta"):
        model = Llama(MODELS["gqa"])
    with pytest.raises(PlanError, match=r"plan .* does not run at tp=2: lm_head raises .*: `colrow check` says what"):
        report(model, Plan({"norm": "sequence"}), tp=2, batch_size=1, seq_len=8)
