"""Whether a model that is parted into pipeline stages computes what it computes as one.

A stage is the model with the parts of other stages set to None, and gets the hidden states that the stage before it
returns. Code around the layers runs in every stage (a scale of the output), and what one layer leaves for a later one
beside the hidden states does not arrive. Neither raises.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from colrow.dryrun.calls import example_inputs
from colrow.dryrun.reduced_model import reduced_model
from colrow.errors import ConfigError, first_line
from colrow.parallel.pipeline_split import require_parts
from colrow.parallel.pipeline_stage import stage_copy
from colrow.verifying.dropout import without_dropout
from colrow.verifying.verify import prepared_model

_SEQ_LEN = 16
_TOLERANCE = 1e-5  # of models that compute in fp32 by themselves; what is computed twice or not at all is far above


def refuse_unequal_stages(model: nn.Module, seed: int = 0) -> None:
    """Compare the logits of a reduced model with those of its stages, parted before each layer after the first.

    Raises:
        ConfigError: they differ, a stage does not run, or several stages hold a parameter.
        PlanError: the model is too large, and no smaller one can be made of its config.
    """
    require_parts(model)
    small = prepared_model(reduced_model(model, 1)[0], seed)
    bounds = range(len(require_parts(small)) + 1)
    stages = [stage_copy(small, bounds, index) for index in bounds[:-1]]
    held = Counter(name for stage in stages for name, _ in stage.named_parameters())
    if several := [name for name, count in held.items() if count > 1]:
        raise _unequal(model, f"every stage holds {several[0]}, and trains it on its own")
    (ids,) = example_inputs(small, 2, _SEQ_LEN, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        want, x = _logits(model, small, ids), ids
        for stage in stages:
            x = _logits(model, stage, x)
    if x.shape != want.shape or not torch.allclose(x, want, rtol=0, atol=_TOLERANCE * float(want.abs().max())):
        raise _unequal(model, "its stages, one after the other, give other logits than the model")


def _logits(model: nn.Module, stage: nn.Module, x: Tensor) -> Tensor:
    try:
        with without_dropout(stage):
            out: Tensor = stage(x, seq_len=_SEQ_LEN)
    except Exception as error:
        raise _unequal(model, f"a stage raises {type(error).__name__}: {first_line(error)[:120]}") from error
    return out


def _unequal(model: nn.Module, what: str) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} cannot be parted into pipeline stages: {what}. What forward does around its layers "
        "must belong to embed_tokens, norm or lm_head, and a layer gets nothing but hidden states from the one before",
        {"mesh.pp": 1},
    )
