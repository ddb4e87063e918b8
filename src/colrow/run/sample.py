"""A sample of text from the model in training, on its mesh."""

from __future__ import annotations

import torch

from colrow.config import RunConfig
from colrow.data.tokenizer import Tokenizer
from colrow.models.generate import generate
from colrow.train.setup import Training
from colrow.train.step import SingleStageModel, reshard


def sample(config: RunConfig, training: Training, tokenizer: Tokenizer) -> str:
    """`sample.prompt` and the text that the model continues it with. Collective: all ranks sample the same ids.

    Compiled blocks are run with the batch size and length that they were compiled for: others would compile again.
    """
    assert config.sample.prompt is not None
    runner = training.step.forward_backward
    assert isinstance(runner, SingleStageModel)
    prompt = tokenizer.encode(config.sample.prompt) or [tokenizer.eos_id]
    ids = torch.tensor([prompt], device=training.device)
    if training.compiled:
        ids = ids.expand(config.train.micro_batch, -1)
    sampled = generate(
        runner.logits,
        ids,
        config.sample.tokens,
        temperature=config.sample.temperature,
        seed=config.run.seed,
        pad_multiple=config.data.seq_len if training.compiled else config.mesh.tp,
        context=config.data.seq_len,
        eos_id=tokenizer.eos_id,
    )
    reshard(training.modules[0])
    return tokenizer.decode(sampled[0].tolist())
