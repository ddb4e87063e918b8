"""A vocabulary that tp does not divide, on 2, 3 and 4 ranks: each loss, own and tied heads, a resume at every other tp,
and an export, against one process in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.parity import step as parity
from benchmarks.parity.models import MODELS, SmallModel
from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.export import export
from colrow.mesh import Mesh
from colrow.models.huggingface import name_to_huggingface
from colrow.models.llama import Llama, LlamaConfig
from colrow.sharding.layout import local_tensor
from helpers.harness import Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]

V, TOLERANCE, MIDDLE = 37, 1e-10, parity.STEPS // 2  # shards of 19, 18; 13, 13, 11; 10, 10, 10, 7
PRESETS = ("llama", "llama-fast")
HEADS = [f"{loss} {head}" for loss in ("vocab_parallel", "replicated", "linear") for head in ("own", "tied")]


def sizes(name: str) -> LlamaConfig:
    """Heads and widths that 2, 3 and 4 divide."""
    return LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=2,
        max_position_embeddings=16,
        tie_word_embeddings=name.endswith("tied"),
    )


def small(name: str) -> SmallModel:
    preset, loss, _ = name.split()
    return SmallModel(lambda: Llama(sizes(name)), loss=loss, preset=preset)


@contextmanager
def patched() -> Iterator[None]:
    """Within, the parity step knows these models, every id, and sequences that 2, 3 and 4 divide."""
    models = mock.patch.dict(MODELS, {name: small(name) for name in (f"{p} {h}" for p in PRESETS for h in HEADS)})
    with models, mock.patch.object(parity, "V", V), mock.patch.object(parity, "SEQ_LEN", 12):
        yield


def resumed(device: str, name: str, tp: int, saved: Path, spoil: bool = False) -> float:
    """The largest error of a run that another tp has saved in the middle; `spoil`: of which a row is wrong."""
    mesh, want = Mesh(tp=tp), parity.one_process(name, device)
    training = parity.set_up(device, name, mesh)
    Checkpoints(saved, mesh=mesh, tied=training.tied).load(MIDDLE, training.modules, training.optimizer)
    if spoil:
        with torch.no_grad():
            # on GPUs a copy stands here, which `get_parameter` would refuse
            weight = dict(training.modules[0].named_parameters())["embed_tokens.weight"]
            local_tensor(weight.detach())[-1] += 1e-3
    got = parity.train(training, range(MIDDLE, parity.STEPS))
    apart = [abs(a / b - 1) for a, b in zip(got.losses, want.losses[MIDDLE:], strict=True)]
    return max(*apart, parity._largest(got.parameters, want.parameters, got.parameters.keys()))


def exported(device: str, name: str, tp: int, saved: Path, folder: Path) -> float:
    """The largest difference of the export of what was saved in the middle and trained on, from one process."""
    mesh, want = Mesh(tp=tp), parity.one_process(name, device).parameters
    training = parity.set_up(device, name, mesh)
    Checkpoints(saved, mesh=mesh, tied=training.tied).load(MIDDLE, training.modules, training.optimizer)
    parity.train(training, range(MIDDLE, parity.STEPS))
    export(training.modules, folder, sizes(name), dtype=torch.float64)
    there = load_file(folder / "model.safetensors")
    assert there["model.embed_tokens.weight"].shape == (V, 24)
    return max((there[key] - value.cpu()).abs().max().item() for key, value in _named(want) if key in there)


def _named(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        yield name_to_huggingface(name), tensor


def run(device: str, preset: str, tp: int, folder: Path) -> dict[str, dict[str, Any]]:
    """All losses and heads at one tp; the runs that other degrees have saved in `folder` go on."""
    found: dict[str, dict[str, Any]] = {}
    with patched():
        for name in (f"{preset} {head}" for head in HEADS):
            saved = folder / name.replace(" ", "-")
            others = sorted(path.name for path in saved.iterdir() if path.name.isdigit()) if saved.exists() else []
            errors = parity.on_ranks(device, name, Mesh(tp=tp), saved / str(tp))
            found[name] = {"step": errors.worst, "same tp": errors.resumed}
            found[name] |= {f"from {other}": resumed(device, name, tp, saved / other) for other in others}
            found[name]["export"] = exported(device, name, tp, saved / str(tp), saved / f"export-{tp}")
        found["control"] = {"spoiled": resumed(device, name, tp, saved / "2", spoil=True)}
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_every_loss_and_head_equals_one_process_at_every_tp(ranks: Ranks, tmp_path: Path, preset: str) -> None:
    for tp, others in ((2, 0), (3, 1), (4, 2), (1, 3)):
        for found in ranks(tp).run(run, preset, tp, tmp_path):
            assert found.pop("control")["spoiled"] > 1e-6
            for name, errors in found.items():
                assert len(errors) == 3 + others
                assert errors["same tp"] == 0, name
                assert max(errors.values()) < TOLERANCE, (name, errors)
        ranks(tp).stop()
