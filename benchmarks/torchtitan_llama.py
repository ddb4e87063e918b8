"""torchtitan's settings in the comparison of docs/guide/performance.md: Llama 3 8B, compiled, no recomputation.

In a checkout of torchtitan (commit 7ef10559fd) with `tests/assets/c4_test/data.json`, lines of {"text": ...}:

    PYTHONPATH=.:COLROW/benchmarks torchrun --nproc-per-node 4 -m torchtitan.train --module torchtitan_llama \\
        --config llama3_8b --parallelism.tensor-parallel-degree 4 --parallelism.data-parallel-shard-degree 1 \\
        --training.seq-len 8192 --training.local-batch-size 2

`tps` is tokens/s per GPU. `benchmarks/four_gpus.sh speed` measures colrow's side; both belong in one call, since hosts
differ by more than most changes are worth.
"""

from __future__ import annotations

from typing import Any

from torchtitan.models.llama3 import config_registry  # type: ignore[import-not-found, unused-ignore]


def llama3_8b() -> Any:
    return _settings(32)


def llama3_8b_16() -> Any:
    """The same width, 16 layers."""
    return _settings(16)


def _settings(layers: int) -> Any:
    """AdamW, bf16 over fp32 weights, 15 steps, speed every 5; no checkpoint and no validation."""
    config = config_registry.llama3_8b()
    config.model_spec.model.layers = config.model_spec.model.layers[:layers]
    config.hf_assets_path = "./tests/assets/tokenizer"
    config.dataloader.dataset = "c4_test"
    config.activation_checkpoint.mode = "none"
    config.compile.enable = True
    config.profiling.enable_profiling = False
    config.metrics.enable_tensorboard = False
    config.metrics.log_freq = 5
    config.checkpoint.enable = False
    config.validator.enable = False
    config.training.steps = 15
    return config
