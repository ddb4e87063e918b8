"""Models of transformers on every mesh but pipelines: the gradients of one process, ties kept, pipelines refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from colrow.config import RunConfig
from colrow.derive.derivation import derive
from colrow.derive.trace import default_inputs, trace
from colrow.mesh import Mesh, MeshAxes
from helpers.families import transformers_model
from helpers.harness import Ranks
from helpers.parity import relative
from helpers.runs import a_run, figures, model_and_plan, train, write_text

pytest.importorskip("transformers")
pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]

SHARD, REPLICATE, TP4 = Mesh(dp_shard=2, tp=2), Mesh(dp_replicate=2, tp=2), Mesh(tp=4)
MESHES = {"tp2-shard2": SHARD, "tp2-replicate2": REPLICATE, "tp4": TP4}
"""At tp 4 a rank has half a kv head: they are held whole."""
NAMES = ("qwen3", "llama-tied")
"""One with norms on queries and keys; one whose head is the embedding."""
STEPS = 4
TOLERANCE = 2e-4  # the trainer's fp32; a gradient that is not summed is off by a half and more


def run_of(folder: Path, name: str, mesh: Mesh, run: str = "none") -> RunConfig:
    return a_run(
        folder,
        run,
        model={"huggingface": str(folder / name), "implementation": "transformers"},
        mesh=mesh.model_dump(),
        plan=str(folder / f"{name}-tp{mesh.tp}.yaml"),
        train={"steps": STEPS, "compile": False, "precision": "fp32"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    write_text(folder)
    for name in NAMES:
        model = transformers_model(name, vocab_size=320, num_hidden_layers=1)
        model.save_pretrained(folder / name)
        inputs = default_inputs(model, 4)
        traced = trace(model, inputs)
        for tp in {mesh.tp for mesh in MESHES.values()}:  # here, once: a rank would take seconds for each
            derive(model, tp, inputs=inputs, traced=traced).plan().save(folder / f"{name}-tp{tp}.yaml")
    return folder


def gradient_errors(device: str, folder: Path) -> dict[str, dict[str, float]]:
    """Relative errors of loss, norm and gradients that the trainer's step has, against the class on one process."""
    import torch.distributed as dist
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from colrow.sharding.grad_norm import align_gradients, grad_norm
    from colrow.sharding.layout import full_tensor, packed_of
    from colrow.train.setup import set_up

    here = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
    ids = torch.randint(0, 320, (4, 33), generator=torch.Generator().manual_seed(5)).to(here)
    found = {}
    for name in NAMES:
        reference: nn.Module = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).to(here)
        want = F.cross_entropy(reference(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        want.backward()
        expected = dict(reference.named_parameters(remove_duplicate=False))
        for label, shape in MESHES.items():
            config = run_of(folder, name, shape)
            mesh = shape.build(device, dist.get_world_size())
            training = set_up(config, mesh, here, *model_and_plan(config))
            (model,) = training.modules
            mine = ids.chunk(shape.dp)[MeshAxes(mesh).data_rank]
            got = training.step.forward_backward([(mine[:, :-1], mine[:, 1:])])
            for axis in ("dp_replicate", "dp_shard"):
                dist.all_reduce(got, group=mesh[axis].get_group())
            align_gradients(training.step.params)
            norm = grad_norm(training.step.counted, training.step.norm_groups)
            errors = {
                "loss": abs(got.item() / shape.dp / want.item() - 1),
                "norm": abs(norm.item() / grad_norm(reference.parameters()).item() - 1),
            }
            for param_name, param in model.named_parameters():
                assert param.grad is not None
                whole = full_tensor(param.grad, packed_of(model, param_name))
                errors[param_name] = relative(whole, expected[param_name].grad)
            assert len(errors) == 2 + len(list(reference.parameters()))
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "llama-tied")
            found[f"{name} {label}"] = errors
    return found


def test_gradients_are_those_of_one_process(ranks: Ranks, folder: Path) -> None:
    for seen in ranks(4).run(gradient_errors, folder):
        assert set(seen) == {f"{name} {mesh}" for name in NAMES for mesh in MESHES}
        for case, errors in seen.items():
            assert max(errors.values()) < TOLERANCE, (case, {k: v for k, v in errors.items() if v > TOLERANCE})
        assert any("q_norm" in name for name in seen["qwen3 tp2-shard2"])


def move_over_meshes(device: str, folder: Path) -> None:
    """Steps on one mesh; and the same steps on three, each part from the other's checkpoint."""
    for name in NAMES:
        train(device, run_of(folder, name, TP4, f"{name}-straight"))
        for mesh, stop_after in ((SHARD, 1), (REPLICATE, 1), (TP4, None)):
            train(device, run_of(folder, name, mesh, f"{name}-moved"), stop_after)


@pytest.mark.exhaustive
def test_a_run_moves_from_mesh_to_mesh_and_is_exported(ranks: Ranks, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ranks(4).run(move_over_meshes, folder)
    for name in NAMES:
        straight, moved = (figures(folder / f"{name}-{run}" / "metrics.jsonl") for run in ("straight", "moved"))
        assert [record["step"] for record in moved] == list(range(1, STEPS + 1))
        for want, got in zip(straight, moved, strict=True):
            # fp32: where a gradient is near zero, Adam's first steps turn its rounding into a step of full size
            assert got == pytest.approx(want, rel=1e-3)
        start, whole, parts = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            for path in (folder / name, folder / f"{name}-straight" / "export", folder / f"{name}-moved" / "export")
        )
        assert type(start) is type(parts)
        assert (parts.lm_head.weight is parts.model.embed_tokens.weight) == (name == "llama-tied")
        ids = torch.arange(64).view(1, -1)
        with torch.no_grad():
            before, want, got = (model(ids).logits for model in (start, whole, parts))
        assert relative(got, want) < 1e-2
        assert relative(before, want) > 5e-2  # the steps have moved it


def test_pipelines_are_refused_with_the_reason(folder: Path) -> None:
    from colrow.errors import ConfigError
    from colrow.run import preflight

    config = run_of(folder, "qwen3", Mesh(pp=2, tp=2)).model_copy(update={"device": "cpu"})
    with pytest.raises(
        ConfigError, match=r"Qwen3ForCausalLM is none: use .*implementation: colrow, or set mesh.pp to 1"
    ):
        preflight.check(config)
