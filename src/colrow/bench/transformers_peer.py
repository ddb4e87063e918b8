"""The arm `transformers`: a Hugging Face folder, trained with transformers' own tensor parallelism.

Its ranks run `python -m colrow.bench.transformers_peer JOB RESULT` under torchrun: the class of the folder, sharded by
its own plan, fp32 weights and bf16 autocast on GPUs, compiled there, AdamW. No gradient is clipped: the parameters are
plain tensors and DTensors, whose norms torch does not add.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import sdpa_kernel

from colrow.bench.measure import Job, memory_peaks, of_slowest_rank, random_batches, timed_steps
from colrow.config import RunConfig
from colrow.errors import ConfigError
from colrow.run.process_group import join
from colrow.run.requirements import device_type
from colrow.train.attention import PREFERRED

MODULE = "colrow.bench.transformers_peer"


def check_transformers(config: RunConfig) -> None:
    """Raise a ConfigError where transformers' own tensor parallelism cannot run the config."""
    if config.model.huggingface is None:
        raise ConfigError(
            "arm transformers: needs a config whose model.huggingface is a folder: give it in the place of --shape"
        )
    if not config.mesh.tp_alone or config.micro_batches > 1:
        raise ConfigError(f"arm transformers: runs on a mesh of tp alone, one micro-batch a step; here {config.mesh}")


def measured(job: Job) -> dict[str, Any]:
    """The arm's results, the same on each rank. Collective.

    Raises:
        ConfigError: the folder's plan shards no parameter.
    """
    config = job.config
    device = join(device_type(config), int(os.environ["LOCAL_RANK"]))
    on_gpu = device.type == "cuda"
    model = _sharded(str(config.model.huggingface), config.mesh.tp, device)
    split = sum(isinstance(param, DTensor) for param in model.parameters())
    if not split:
        raise ConfigError("arm transformers: its plan has sharded nothing")
    run = torch.compile(model) if on_gpu else model  # as its users run it at its fastest
    optimizer = _adamw(model, config, on_gpu)

    def step(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu), sdpa_kernel(PREFERRED, set_priority=True):
            loss: Tensor = run(input_ids=ids, labels=ids, use_cache=False).loss  # the class shifts labels itself
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    sizes: Any = model.config
    batches = random_batches(config, sizes.vocab_size, 0, device)
    # not timed: compilation, and the allocator's first blocks
    losses = [step(next(batches)[0][0]) for _ in range(job.warmup)]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = timed_steps(lambda number, batch: losses.append(step(batch[0][0])), batches, job, device)
    found = {
        "seconds": of_slowest_rank(seconds, device),
        "steps": seconds,
        "losses": [losses[0].item(), losses[-1].item()],
        "sharded": split,
        **memory_peaks(device),
    }
    dist.destroy_process_group()
    return found


def _sharded(folder: str, tp: int, device: torch.device) -> nn.Module:
    """The folder's model, by the plan of its class."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    options: dict[str, Any] = {"tp_plan": "auto"}
    # the source and not the signature: from_pretrained takes it out of its **kwargs
    if "distributed_config" in inspect.getsource(PreTrainedModel.from_pretrained):  # newer releases
        from transformers.distributed import DistributedConfig

        if "tp_plan" in inspect.signature(DistributedConfig).parameters:
            options = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=tp)}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.to(device).train()


def _adamw(model: nn.Module, config: RunConfig, fused: bool) -> torch.optim.Optimizer:
    """AdamW with plain tensors and DTensors in groups of their own: torch's kernels do not take both together."""
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [[p for p in params if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    return torch.optim.AdamW(
        [{"params": group} for group in groups if group], lr=config.train.lr, betas=config.train.betas, fused=fused
    )


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    found = measured(Job.model_validate_json(job_file.read_text(encoding="utf-8")))
    if int(os.environ["RANK"]) == 0:
        result_file.write_text(json.dumps(found), encoding="utf-8")
