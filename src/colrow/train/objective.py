"""A model's own objective: what its loss is beside the cross entropy of its logits.

[Note: objective]
A class of transformers computes its loss where it gets `labels`: next-token cross entropy plus weighted losses that it
also returns (`aux_loss` of its routers, where the config switches `output_router_logits` on). A run gives no labels: it
computes the cross entropy itself, sharded, and adds the returned losses by the same weights. The weights are not looked
up under the names that configs give them: on a reduced model with labels they are d loss / d returned loss. What the
loss holds beyond that is an option that a run does not train.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.dryrun.calls import call_model, example_inputs, is_huggingface, vocabulary
from colrow.dryrun.reduced_model import reduced_model
from colrow.errors import ConfigError
from colrow.models.build import Source
from colrow.parallel.outputs import auxiliary_losses, main_tensor, output_tensors
from colrow.sharding.parameter_state import copied_model

_TOLERANCE = 1e-5
"""The relative error allowed of what is left of the loss: the model computes in fp32."""


def auxiliary_weights(source: Source, given: Mapping[str, float] | None) -> dict[str, float]:
    """The weight of each loss that the model returns beside its logits: those `given` (`train.auxiliary_losses`), or
    those by which the model's own loss adds them. Takes a fraction of a second.

    Raises:
        ConfigError: the model's own loss is another one than next-token cross entropy plus the losses that it returns.
    """
    if given is not None:
        _require_returned(source, given)
        return dict(given)
    if source.config is not None or "labels" not in inspect.signature(source.model.forward).parameters:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = small_model(source.model)
            ids = torch.randint(0, vocabulary(model) or 2, (2, 16))
            output = call_model(model, {"input_ids": ids, "labels": ids})
        except Exception:  # it does not run on a CPU, say: what it returns and a run does not train is named then
            return {}
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return {}
    logits = main_tensor(output)
    if logits.shape[:-1] != ids.shape:
        return {}  # refused by `require_causal`
    entropies = [F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).item()]
    if not is_huggingface(model):  # a user's model may take labels that are shifted already, as a run's targets are
        entropies.append(F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).item())
    return _weights(source.name, loss, entropies, auxiliary_losses(output))


def _require_returned(source: Source, given: Mapping[str, float]) -> None:
    """Raise a ConfigError where a reduced model returns none of the losses that are to be trained."""
    scalars: list[str] = []
    if given and source.config is None:  # colrow's own Llama returns logits alone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                model = small_model(source.model)
                output = call_model(model, example_inputs(model, 2, 16))
            except Exception:  # it does not run on a CPU, say: the first step looks again
                return
        scalars = [name for name, tensor in output_tensors(output) if tensor.dim() == 0]
    for name in given:
        if name not in scalars:
            raise ConfigError(
                f"train.auxiliary_losses has a weight for {name}, and {source.name} returns no such scalar: it returns "
                f"{', '.join(scalars) or 'none'}",
                {"train.auxiliary_losses": {key: weight for key, weight in given.items() if key in scalars}},
            )


def small_model(model: nn.Module) -> nn.Module:
    """A small model of the same options, with values, on the CPU; the model itself is left alone."""
    small, _ = reduced_model(model, 2)
    if is_huggingface(small) and any(param.is_meta for param in small.parameters()):
        config: Any = small.config
        small = type(small)(config).train(model.training)
    small = copied_model(small) if small is model else small
    with torch.no_grad():
        for param in small.parameters():  # a new model's logits are nearly equal, and many losses are alike on them
            param.add_(torch.randn_like(param) * 0.2)
    return small


def _weights(name: str, loss: Tensor, entropies: list[float], returned: dict[str, Tensor]) -> dict[str, float]:
    """The weights of the returned losses in `loss`, the rest of which must be one of `entropies`."""
    losses = {key: tensor for key, tensor in returned.items() if tensor is not loss}
    gradients = torch.autograd.grad(loss, list(losses.values()), allow_unused=True) if losses else ()
    weights = {
        key: float(f"{gradient.item():.7g}")  # the config's number: fp32 has it to 7 digits
        for key, gradient in zip(losses, gradients, strict=True)
        if gradient is not None
    }
    rest = loss.item() - sum(weight * losses[key].item() for key, weight in weights.items())
    if not any(abs(rest - entropy) <= _TOLERANCE * abs(loss.item()) for entropy in entropies):
        terms = "".join(f" + {weight:g} {key}" for key, weight in weights.items())
        raise ConfigError(
            f"the loss of {name} with labels is another one than a run trains: on random tokens {loss.item():.4f}, and "
            f"next-token cross entropy{terms} is {loss.item() - rest + entropies[0]:.4f}. An option of the model "
            "changes its loss: switch it off, or set train.auxiliary_losses to the returned losses and weights to "
            "train ({} for none)"
        )
    return weights
