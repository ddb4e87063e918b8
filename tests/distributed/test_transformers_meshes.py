"""Models of transformers on every mesh but pipelines: the gradients of one process, ties kept, pipelines refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from colrow.config import RunConfig, parse_config
from colrow.mesh import Mesh
from distributed.harness import Ranks
from distributed.parity import relative
from models.families import transformers_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.distributed

SHARD, REPLICATE, TP4 = Mesh(dp_shard=2, tp=2), Mesh(dp_replicate=2, tp=2), Mesh(tp=4)
MESHES = {"tp2-shard2": SHARD, "tp2-replicate2": REPLICATE, "tp4": TP4}
"""At tp 4 a rank has half a kv head: they are held whole."""
NAMES = ("qwen3", "llama-tied")
"""One with norms on queries and keys, one whose head is the embedding."""
TOLERANCE = 2e-4  # the trainer's fp32; a gradient that is not summed is off by a half and more


def a_run(folder: Path, name: str, run: str, mesh: Mesh, **train: Any) -> RunConfig:
    return parse_config(
        {
            "run": {"dir": str(folder / run)},
            "model": {"huggingface": str(folder / name), "implementation": "transformers"},
            "plan": "derive",
            "mesh": mesh.model_dump(),
            "data": {
                "corpus": str(folder / "*.txt"),
                "seq_len": 32,
                "tokenizer": {"vocab_size": 300},
                "validation_fraction": 0.2,
                "cache": str(folder / "cache"),
                "workers": 1,
            },
            "train": {"steps": 2, "global_batch": 4, "micro_batch": 1, "lr": 1e-3, **train},
            "sample": {"prompt": None},
            "check": False,  # what the launcher does; here there is none
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    words = [f"row {i} times column {i * i % 97} is {i * 31 % 89}." for i in range(4000)]
    (folder / "text.txt").write_text("\n\n".join(words), encoding="utf-8")
    for name in NAMES:
        transformers_model(name, vocab_size=320).save_pretrained(folder / name)
    return folder


def gradient_errors(device: str, folder: Path) -> dict[str, dict[str, float]]:
    """Relative errors of loss, norm and gradients that the trainer's step has, against the class on one process."""
    import torch.distributed as dist
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from colrow.parallel.grad_norm import align_gradients, grad_norm
    from colrow.parallel.layout import full_tensor, packed_of
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
            config = a_run(folder, name, "none", shape, compile=False, precision="fp32")
            mesh = shape.build(device, dist.get_world_size())
            training = set_up(config, mesh, here)
            (model,) = training.modules
            data_rank = mesh["dp_replicate"].get_local_rank() * shape.dp_shard + mesh["dp_shard"].get_local_rank()
            mine = ids.chunk(shape.dp)[data_rank]
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


def test_pipelines_are_refused_with_the_reason(folder: Path) -> None:
    from colrow.errors import ConfigError
    from colrow.train import preflight

    config = a_run(folder, "qwen3", "none", Mesh(pp=2, tp=2))
    with pytest.raises(
        ConfigError, match=r"Qwen3ForCausalLM is none: use .*implementation: colrow, or set mesh.pp to 1"
    ):
        preflight.check(config)
