"""Which parameters decay, by their role: matrices do, norms and biases of any number of dims do not.

A role shows in the model as its author wrote it, not in a shard of it: it is decided once, by name, before anything
wraps or splits the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from colrow.config_sections import TrainSection
from colrow.errors import ConfigError
from colrow.plans.patterns import nearest
from colrow.sharding.layout import unwrapped_name

_NORM_CLASS = re.compile(r"(norm|normalization|rms|^ln)(\d+d?|gated|layer|fp32|float32)?$", re.IGNORECASE)
"""LayerNorm, LlamaRMSNorm, LayerNorm2d, RMSNormGated; not NormHead, which is a matrix."""
_NORM_NAME = re.compile(r"(^|_)(\w*norm|rms|ln)(_?(\d+|[a-z]))?$")
"""A module called q_norm, input_layernorm, norm1, ln_f, norm_q."""
_GAIN = re.compile(r"norm|(^|_)(scales?|gains?|gamma|beta)$|(^|_)(ln|rms)(_|$)")
"""A parameter that a module applies as a norm by itself: q_norm, k_norm_weight, q_scale, ln_weight."""
_SHORT_BIAS = re.compile(r"^b\d*$|^b_|_b\d*$")
_MATRICES = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of the model, over all ranks."""

    total: int
    trained: int
    decaying: int


def decay_by_name(model: nn.Module, section: TrainSection) -> dict[str, bool]:
    """Whether each parameter decays, under each of its names. Frozen parameters do not.

    Matrices and embeddings decay; vectors, norms and biases do not; nor what `section.no_decay` names, or the model's
    author has marked with `_no_weight_decay`, as Mamba's A_log and D.

    Args:
        model: unsharded and not wrapped; it may be on the meta device.

    Raises:
        ConfigError: a pattern of `no_decay` matches no parameter.
    """
    names: dict[int, list[str]] = {}
    decays: dict[int, bool] = {}
    for name, owner, param in _owned(model):
        vector = _is_vector(owner, param) or getattr(param, "_no_weight_decay", False)
        is_matrix = not vector and not _is_norm(name, owner) and not _is_bias(name, owner, param)
        names.setdefault(id(param), []).append(name)
        # a tied parameter has one owner a name: it decays unless one of them says norm or bias
        decays[id(param)] = decays.get(id(param), True) and is_matrix and param.requires_grad
    every = [name for group in names.values() for name in group]
    for pattern in section.no_decay:
        if not any(_matches(pattern, name) for name in every):
            near = nearest(pattern, every)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigError(f"train.no_decay: {pattern!r} matches no parameter of the model{hint}")
    return {
        name: decays[key] and not any(_matches(pattern, n) for pattern in section.no_decay for n in group)
        for key, group in names.items()
        for name in group
    }


def count_parameters(model: nn.Module, decays: Mapping[str, bool]) -> ParameterCounts:
    """The numbers of parameters of the unsharded model; a tied parameter counts once."""
    sizes = {name: (param.numel(), param.requires_grad) for name, param in model.named_parameters()}
    return ParameterCounts(
        total=sum(n for n, _ in sizes.values()),
        trained=sum(n for n, trained in sizes.values() if trained),
        decaying=sum(n for name, (n, _) in sizes.items() if decays[name]),
    )


def decaying_parameters(stages: Iterable[nn.Module], decays: Mapping[str, bool]) -> set[nn.Parameter]:
    """This rank's parameters that decay. Two stages' copies of a tied parameter agree: both names have one role."""
    named = (item for stage in stages for item in stage.named_parameters())
    return {param for fqn, param in named if decays[unwrapped_name(fqn)]}


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Each parameter with its name and the module that holds it; a shared one under every name."""
    for module_name, module in model.named_modules(remove_duplicate=False):
        for leaf, param in module.named_parameters(recurse=False):
            yield f"{module_name}.{leaf}" if module_name else leaf, module, param


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern names the parameter or a module around it, by the shell's rules; `*` matches dots too."""
    while name:
        if fnmatchcase(name, pattern):
            return True
        name = name.rpartition(".")[0]
    return False


def _last_words(name: str) -> list[str]:
    """A name's components without numbers, the last first: of `q_norms.3.weight` weight, q_norms."""
    return [part for part in reversed(name.lower().split(".")) if not part.isdigit()]


def _is_vector(owner: nn.Module, param: nn.Parameter) -> bool:
    """Whether the parameter has one dim, or a shape to broadcast such as [1, 1, D] or [H, 1, 1]. [1, D] is no vector:
    it may be the weight of a product with one output."""
    dims = [size for size in param.shape if size > 1]
    return param.ndim < 2 or (param.ndim > 2 and len(dims) < 2 and not isinstance(owner, _MATRICES))


def _is_norm(name: str, owner: nn.Module) -> bool:
    if isinstance(owner, _MATRICES):
        return False
    leaf, *around = _last_words(name)
    by_class = any(_NORM_CLASS.search(cls.__name__) for cls in type(owner).__mro__)
    return bool(by_class or _GAIN.search(leaf) or (around and _NORM_NAME.search(around[0])))


def _is_bias(name: str, owner: nn.Module, param: nn.Parameter) -> bool:
    """`bias`, `gate_up_proj_bias`, `in_proj_bias`; a short name such as `b1` beside `w1`, whose output it has."""
    leaf = _last_words(name)[0]
    if "bias" in leaf:
        return True
    if not _SHORT_BIAS.search(leaf):
        return False
    shapes = [tuple(other.shape) for other in owner.parameters(recurse=False) if other.ndim >= 2 and other is not param]
    for shape in shapes:
        for dim in (len(shape) - 2, len(shape) - 1):  # the weight's input
            if tuple(param.shape) in (shape[:dim] + shape[dim + 1 :], (*shape[:dim], 1, *shape[dim + 1 :])):
                return True
    return False
