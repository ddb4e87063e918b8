"""torchtitan's settings for an arm of `colrow bench`; torchtitan's trainer imports this, `--config measured`.

Written for its main of 2026-04-09 (commit 7ef10559fd).
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from colrow.bench.peers import FLAVOURS, WINDOW
from colrow.config import RunConfig


def measured() -> Any:
    """The config of the environment's COLROW_PEER: AdamW, bf16 over fp32 weights, compiled, no recomputation."""
    ours = RunConfig.model_validate_json(os.environ["COLROW_PEER"])
    theirs = importlib.import_module("torchtitan.models.llama3.config_registry")
    config = theirs.llama3_8b()
    assert ours.model.shape is not None
    config.model_spec = importlib.import_module("torchtitan.models.llama3").model_registry(FLAVOURS[ours.model.shape])
    if ours.model.layers is not None:
        config.model_spec.model.layers = config.model_spec.model.layers[: ours.model.layers]
    config.hf_assets_path = "./tests/assets/tokenizer"
    # the data set that torchtitan reads from a folder; its own are downloaded
    config.dataloader.dataset, config.dataloader.dataset_path = "c4_test", os.environ["COLROW_PEER_DATA"]
    config.activation_checkpoint.mode = "none"
    config.compile.enable = True
    config.profiling.enable_profiling = False
    config.metrics.enable_tensorboard = False
    config.metrics.log_freq = WINDOW
    config.checkpoint.enable = False
    config.validator.enable = False
    config.training.steps = 4 * WINDOW  # the first window compiles; the best of three counts
    config.training.seq_len, config.training.local_batch_size = ours.data.seq_len, ours.train.micro_batch
    parallel = config.parallelism
    parallel.tensor_parallel_degree = ours.mesh.tp
    parallel.data_parallel_shard_degree = ours.mesh.dp_shard
    parallel.data_parallel_replicate_degree = ours.mesh.dp_replicate
    return config
