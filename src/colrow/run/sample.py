"""A sample of text from the model in training, on the mesh that it is on."""

from __future__ import annotations

import torch

from colrow.config import RunConfig
from colrow.data.tokenizer import Tokenizer
from colrow.models.generate import generate
from colrow.train.setup import Training
from colrow.train.step import WholeModel, reshard


def sample(config: RunConfig, training: Training, tokenizer: Tokenizer) -> str:
    """`sample.prompt` and what a whole model continues it with. Collective: the ranks draw equal ids.

    Compiled blocks are run with the batch and length that they were compiled for, eager ones with the tokens there are.
    """
    assert config.sample.prompt is not None
    whole = training.step.forward_backward
    assert isinstance(whole, WholeModel)
    prompt = tokenizer.encode(config.sample.prompt) or [tokenizer.eos_id]
    ids = torch.tensor([prompt], device=training.device)
    if training.compiled:
        ids = ids.expand(config.train.micro_batch, -1)
    drawn = generate(
        whole.logits,
        ids,
        config.sample.tokens,
        temperature=config.sample.temperature,
        seed=config.run.seed,
        pad_multiple=config.data.seq_len if training.compiled else config.mesh.tp,
        context=config.data.seq_len,
        eos_id=tokenizer.eos_id,
    )
    reshard(training.modules[0])
    return tokenizer.decode(drawn[0].tolist())
