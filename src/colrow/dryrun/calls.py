"""How a model of any family is called, and the scalar that its output becomes: one rule for derive, check and verify.

[Note: example inputs]
What the caller gives counts (`inputs=`, or `--inputs` of the command line): a tensor, positional arguments, or a
mapping of keyword arguments. Else the model says it: by the name of its first argument (`input_ids`, `pixel_values`,
`hidden_states`), else by its first layer. Token ids [B, T] where there is an embedding; pixels [B, C, H, W] where a 2-D
convolution comes first; features [B, T, D] or [B, C, T] where a linear layer or a 1-D convolution does. A model that
needs more than one argument, or has none of these, is refused: a guess would judge another model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.errors import PlanError
from colrow.parallel.outputs import auxiliary_losses, main_tensor
from colrow.plans.plan import Plan
from colrow.sharding.layout import full_tensor
from colrow.styles.linear_head import PendingTargets, expect_targets
from colrow.torch_compat import tree_flatten, tree_leaves, tree_unflatten

GivenInputs: TypeAlias = "Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]"
Loss = Callable[[Any, Any], Tensor]
"""A scalar from the model's output, as the model returns it, and from the inputs: a tuple, or the mapping given."""

_TOKENS = {"input_ids", "ids", "idx", "tokens", "token_ids"}
_PIXELS = {"pixel_values", "pixels", "images", "image", "img", "imgs"}
_FEATURES = {"inputs_embeds", "hidden_states", "features", "input_features"}


class Inputs(tuple[Any, ...]):
    """The arguments of a model: positional, or under `names`."""

    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: GivenInputs) -> Inputs:
        """The inputs that a caller gives."""
        if isinstance(given, Inputs):
            return given
        if isinstance(given, Mapping):
            return cls(given.values()).named(tuple(given))
        return cls((given,) if isinstance(given, Tensor) else given)

    def named(self, names: tuple[str, ...]) -> Inputs:
        self.names = names
        return self

    def map(self, change: Callable[[Any], Any]) -> Inputs:
        """With each value changed, those inside of lists, tuples and dicts too."""
        leaves, tree = tree_flatten(tuple(self))
        return Inputs(tree_unflatten(map(change, leaves), tree)).named(self.names)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in order, those inside of lists, tuples and dicts too."""
        return [x for x in tree_leaves(tuple(self)) if isinstance(x, Tensor)]

    def require_tensors(self, model: nn.Module) -> None:
        """Raises PlanError where there is none."""
        if not self.tensors:
            kinds = ", ".join(sorted({type(x).__name__ for x in self})) or "nothing"
            raise PlanError(
                f"the inputs of {type(model).__name__} hold no tensor, but {kinds}: "
                "give tensors, or lists, tuples and dicts of tensors"
            )

    def like_on_cpu(self) -> Inputs:
        """Tensors of the same shapes and dtypes on the CPU, for runs on fake tensors: these look at no values."""
        return self.map(lambda x: torch.empty_like(x, device="cpu") if isinstance(x, Tensor) else x)

    def within(self, vocab: int | None) -> Inputs:
        """Token ids of a larger model as ids of one that knows `vocab` of them."""
        integers = (torch.int32, torch.int64)
        return self.map(lambda x: x % vocab if vocab and isinstance(x, Tensor) and x.dtype in integers else x)

    @property
    def given(self) -> Any:
        """What a loss gets: the mapping of names, or a tuple."""
        return dict(zip(self.names, self, strict=True)) if self.names else tuple(self)


def is_huggingface(model: nn.Module) -> bool:
    """Whether the model is one of the `transformers` library."""
    return any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


def vocabulary(model: nn.Module) -> int | None:
    """The number of token ids that the model's first embedding knows; None for a model without one."""
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)


def most_positions(model: nn.Module) -> int | None:
    """The longest sequence that the model's config knows; None where it states none."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


def example_inputs(model: nn.Module, batch_size: int, seq_len: int, generator: torch.Generator | None = None) -> Inputs:
    """Inputs of the kind that the model takes (see [Note: example inputs]), drawn at random.

    Raises:
        PlanError: neither its signature nor its layers show what it takes.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    takes = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in takes if p.default is p.empty]
    if len(required) > 1:
        raise _unknown(model, f"takes {', '.join(required)}")
    shape = _shape(model, (required or [takes[0].name if takes else ""])[0], batch_size, seq_len)
    if shape is None:
        return Inputs((torch.randint(0, vocabulary(model) or 2, (batch_size, seq_len), generator=generator),))
    param = next(model.parameters(), None)
    dtype = param.dtype if param is not None and param.is_floating_point() else torch.get_default_dtype()
    return Inputs((torch.randn(shape, dtype=dtype, generator=generator),))


def _shape(model: nn.Module, argument: str, batch_size: int, seq_len: int) -> tuple[int, ...] | None:
    """The shape of a floating-point input; None for token ids."""
    # the argument's name says most; else what the first layer takes is what the model takes
    config = getattr(model, "config", None)
    layers = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.Conv2d | nn.Conv1d | nn.Linear)]
    first = layers[0] if layers else None
    convolution = next((m for m in layers if isinstance(m, nn.Conv2d)), None)
    embedding = vocabulary(model) is not None
    if argument in _PIXELS or (argument not in _TOKENS | _FEATURES and isinstance(first, nn.Conv2d)):
        channels = getattr(config, "num_channels", None) or (convolution.in_channels if convolution else 3)
        size = getattr(config, "image_size", None) or 32
        height, width = size if isinstance(size, tuple | list) else (size, size)
        return batch_size, int(channels), int(height), int(width)
    if argument in _TOKENS or (embedding and argument not in _FEATURES):
        return None
    if isinstance(first, nn.Conv1d):
        return batch_size, first.in_channels, seq_len
    linear = next((m.in_features for m in layers if isinstance(m, nn.Linear)), None)
    features = getattr(config, "hidden_size", None) or linear
    if features is None:
        raise _unknown(model, "has neither an embedding nor a linear layer that shows its input")
    return batch_size, seq_len, int(features)


def _unknown(model: nn.Module, why: str) -> PlanError:
    return PlanError(
        f"{type(model).__name__} {why}: pass example inputs with inputs=(...), a tuple or a mapping by name (on the "
        "command line --inputs package.module:callable)"
    )


def call_model(model: nn.Module, inputs: GivenInputs) -> Any:
    """What the model returns for the inputs.

    Token ids alone are passed as `input_ids` where the model takes that name; no key-value cache is kept.
    """
    inputs = Inputs.of(inputs)
    known = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if inputs.names:
        return model(**{**kwargs, **inputs.given})
    if "input_ids" in known and len(inputs) == 1 and not inputs[0].is_floating_point():
        return model(input_ids=inputs[0], **kwargs)
    return model(*inputs, **kwargs)


def token_ids(inputs: Any) -> Tensor | None:
    """The token ids [B, T] of the inputs: the first argument, or the one of such a name, if it is an integer tensor."""
    values = inputs
    if isinstance(inputs, Mapping):
        values = [inputs[name] for name in sorted(inputs, key=lambda name: name not in _TOKENS)]
    first = next(iter(values), None)
    return first if isinstance(first, Tensor) and not first.is_floating_point() and first.dim() == 2 else None


def default_loss(output: Any, inputs: Any) -> Tensor:
    """Next-token cross entropy for logits of token ids, else a fixed weighted sum of the main output; plus every other
    scalar of the output that has a gradient (auxiliary losses).

    The weights differ from element to element: behind a norm, a mean or a square has a zero gradient.
    """
    return _with_auxiliary(_main_loss(main_tensor(output), token_ids(inputs)), output)


def head_loss(output: Any) -> Tensor:
    """`default_loss` of a model whose head has computed the cross entropy (`loss: linear`)."""
    return _with_auxiliary(main_tensor(output), output)


def _with_auxiliary(loss: Tensor, output: Any) -> Tensor:
    for extra in auxiliary_losses(output).values():
        loss = full_tensor(loss) + full_tensor(extra)
    return loss


def _main_loss(output: Tensor, ids: Tensor | None) -> Tensor:
    # A decoder has a length of its own. Logits of a multiple of the tokens are a shard taken for all tokens: the cross
    # entropy refuses them, so that nothing behind that mistake is reported as a second one.
    if ids is not None and output.ndim == 3 and output.shape[1] % ids.shape[1] == 0:
        ids = ids % output.shape[-1]  # of a tagger there are fewer classes than ids
        return F.cross_entropy(output.flatten(0, 1), ids.roll(-1, dims=1).flatten())
    output = full_tensor(output)
    weights = torch.arange(output.numel(), dtype=output.dtype, device=output.device).cos().view(output.shape)
    return (output * weights).sum() / output.numel() ** 0.5


def give_targets(model: nn.Module, plan: Plan, inputs: Any) -> None:
    """Give a head that computes the loss itself (`loss: linear`) the targets of `default_loss`."""
    if plan.loss == "linear":
        ids = token_ids(Inputs.of(inputs).given)
        if ids is None:
            raise PlanError("the plan's loss is linear, the next-token loss, and no input holds token ids [B, T]")
        expect_targets(model, [PendingTargets(ids.roll(-1, dims=1), None, -100)])
