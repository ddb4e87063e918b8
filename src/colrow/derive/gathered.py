"""Layers whose output is gathered, and parameters that are: what is split where nothing else works on shards.

[Note: gathered outputs]
A layer that stands in the stream, on equal activations on all ranks, can be split by its output features if its output
is gathered: an all-gather in forward, and in backward a sum of its input's gradient. What comes behind sees what it did
before, whatever it is: a norm over all channels, code that no trace looks into, a branch on the data. It costs more
than a block between two collectives, so it is taken only for a model of which a plan would split little, or for an
attention of which it would, and for layers of some size.

[Note: gathered parameters]
Where that leaves little split too, parameters that every rank uses on equal values are held in shards and gathered for
their module's forward: bare matrices, LSTMs, weights that are computed from others. It saves memory, and no computing.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn.utils.weight_norm import WeightNorm

from colrow.derive.flow import SpmdType
from colrow.derive.infer import facts_of
from colrow.derive.result import Derivation
from colrow.derive.trace import Trace, is_boundary, label_of
from colrow.plans.patterns import by_pattern, is_within, with_stars
from colrow.plans.plan import USEFUL, Plan
from colrow.sharding.parameter_state import holders_of
from colrow.styles.gathered_parameters import GatheredParameters

if TYPE_CHECKING:
    from colrow.derive.judged import Objection
    from colrow.derive.sequence import Stream
    from colrow.derive.split import Split

Layers = dict[str, dict[str, Any]]
"""The styles of layers, and of what they hold, by name."""
LEAST = 0.01
"""Of the model's parameters, counted with those of the same name but for numbers: what is smaller is not worth two
collectives. One layer of a deep model is a small part of it, and so is one head that has a module of its own."""

ATTEMPTS = 4
"""After as many objections, the outputs stay as they are."""

_KINDS: dict[Any, tuple[dict[str, int], int]] = {
    nn.Linear: ({"weight": 0, "bias": 0}, -1),
    nn.Embedding: ({"weight": 1}, -1),
    nn.EmbeddingBag: ({"weight": 1}, -1),
    nn.Conv1d: ({"weight": 0, "bias": 0}, -2),
    nn.Conv2d: ({"weight": 0, "bias": 0}, -3),
    nn.Conv3d: ({"weight": 0, "bias": 0}, -4),
    nn.ConvTranspose1d: ({"weight": 1, "bias": 0}, -2),
    nn.ConvTranspose2d: ({"weight": 1, "bias": 0}, -3),
    nn.ConvTranspose3d: ({"weight": 1, "bias": 0}, -4),
}
"""By class: the dim of its output features in each parameter, and in its output."""


_LINEAR, _EMPTY = re.compile("Linear$"), torch.empty(0)
_WEIGHT_NORM = "parametrizations.weight"


def gathered_styles(module: nn.Module, tp: int) -> dict[str, dict[str, Any]]:
    """The styles that split the layer by its output features and gather its output, by the name of a module in it (''
    is the layer); empty where nothing does."""
    kind = _kind_of(module)
    if kind is None:
        return {}
    dims, gather = _KINDS[kind]
    shards: dict[str, dict[str, int]] = {"": {name: dims[name] for name in module._parameters if name in dims}}
    norms: list[Any] = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
    if _WEIGHT_NORM in dict(module.named_modules()):
        norms += module.get_submodule(_WEIGHT_NORM).children()
        shards[_WEIGHT_NORM] = {"original0": 0, "original1": 0}
    elif norms:
        shards[""] |= {"weight_g": 0, "weight_v": 0}
    if norms and (dims["weight"] != 0 or any(getattr(norm, "dim", None) != 0 for norm in norms)):
        return {}  # each output feature has to have a norm of its own
    found: dict[str, dict[str, Any]] = {}
    for name, by_parameter in shards.items():
        own = {n: p for n, p in module.get_submodule(name)._parameters.items() if p is not None}
        if not own.keys() <= by_parameter.keys() or any(p.shape[by_parameter[n]] % tp for n, p in own.items()):
            return {}
        found[name] = {"style": "local_shards", "shards": {n: by_parameter[n] for n in own}}
    found[""]["gather"] = gather
    if kind not in (nn.Embedding, nn.EmbeddingBag):  # ids are no activation that could be a shard
        found[""]["input"] = "replicate"
    return found


def _kind_of(module: nn.Module) -> Any:
    """The class of torch's whose forward the layer has; None where it has another one, or mixes output features."""
    kind = next((kind for kind in _KINDS if isinstance(module, kind) and type(module).forward is kind.forward), None)
    if kind is None and _LINEAR.search(type(module).__name__) and getattr(module, "weight", _EMPTY).dim() == 2:
        kind = nn.Linear  # of a library of its own: whether it is one, the judge sees
    looks_at_rows = getattr(module, "max_norm", None) is not None or getattr(module, "sparse", False)
    return None if looks_at_rows or getattr(module, "groups", 1) != 1 else kind


def gathered_layers(
    model: nn.Module, tp: int, stands: Callable[[str], bool], taken: Collection[str], kept: Collection[str]
) -> Layers:
    """The styles of the layers whose output can be gathered.

    Args:
        stands: whether the module of this name gets, and gives, what is equal on all ranks.
        taken: modules that have a style already.
        kept: parameters that stay unsharded.
    """
    holders = holders_of(model)  # another holder of a tied parameter would get a shard of it
    large, found = _large_names(model), Layers()
    for name, module in model.named_modules():
        params = list(module.parameters())
        if with_stars(name) not in large or name in taken or any(holders[param] > 1 for param in params):
            continue
        if any(f"{name}.{parameter}" in kept for parameter, _ in module.named_parameters()):
            continue
        around = model.get_submodule(name.rpartition(".")[0])
        if isinstance(around, nn.MultiheadAttention) or not stands(name):
            continue  # torch's attention reads the weight of its layer, and does not call it
        found |= {f"{name}.{inner}" if inner else name: style for inner, style in gathered_styles(module, tp).items()}
    return found


def _large_names(model: nn.Module) -> set[str]:
    """Names of parameters and modules, with stars for numbers, that stand for enough parameters to gather."""
    sizes: Counter[str] = Counter()
    for name, param in model.named_parameters():
        parts = name.split(".")
        for inside in {with_stars(".".join(parts[:k])) for k in range(1, len(parts) + 1)} | {""}:
            sizes[inside] += param.numel()
    return {name for name, size in sizes.items() if size >= LEAST * sizes[""]}


def gathered_parameters(
    model: nn.Module, tp: int, stands: Callable[[str], bool], taken: Collection[str], kept: Collection[str]
) -> Layers:
    """The styles of the modules whose parameters can be gathered: [Note: gathered parameters].

    Args:
        stands: whether every rank uses the parameter of this name on the same values.
        taken, kept: of `gathered_layers`.
    """
    holders = holders_of(model)  # another holder of a tied parameter would get a shard of it
    large = _large_names(model)
    longest = max((extent for param in holders if param.dim() > 1 for extent in param.shape), default=sys.maxsize)
    found: Layers = {}
    for name, module in model.named_modules():
        shards = {}
        for parameter, param in module._parameters.items() if name not in taken else ():
            full = f"{name}.{parameter}".removeprefix(".")
            if param is None or with_stars(full) not in large or holders[param] > 1 or full in kept or not stands(full):
                continue
            if (dim := next((k for k, extent in enumerate(param.shape) if extent % tp == 0), None)) is not None:
                shards[parameter] = dim
        # biases alone are not worth two collectives; a vector that matrices are cut out of is
        params = [module.get_parameter(parameter) for parameter in shards]
        if any(param.dim() > 1 or param.numel() > longest for param in params):
            found[name] = {"style": GatheredParameters.name, "shards": shards}
    return found


def parameters_of(layers: Layers) -> frozenset[str]:
    """The parameters that the styles split."""
    return frozenset(f"{name}.{p}".removeprefix(".") for name, style in layers.items() for p in style["shards"])


class Standing:
    """Which modules of a traced model get, and give, what is equal on all ranks, with gradients that are."""

    def __init__(self, traced: Trace, split: Split | None, stream: Stream | None) -> None:
        self.traced, self.split, self.stream = traced, split, stream
        self.boundaries: dict[str, list[Node]] = defaultdict(list)
        for node in filter(is_boundary, traced.nodes):
            self.boundaries[label_of(node).module].append(node)
        self.opaque = [name for name in traced.opaque.reasons if self._is_between_equals(name)]

    def __call__(self, name: str) -> bool:
        if any(name.startswith(f"{outer}.") for outer in self.opaque):
            return True
        reads_weight = any(f"{name}.{parameter}" in self.traced.outside for parameter in ("weight", "bias"))
        calls_once = self.traced.positional.get(name) in (1, 2)
        return calls_once and not reads_weight and self._is_between_equals(name)

    def is_equal(self, parameter: str) -> bool:
        """Whether every rank uses the parameter on the same values, so that it has the complete gradient of it."""
        summed = self.split.flow.summed if self.split is not None else ()
        in_stream = self.stream.summed if self.stream is not None else ()
        used = parameter in self.traced.parameters.values() or any(is_within(parameter, m) for m in self.opaque)
        return used and parameter not in summed and parameter not in in_stream

    def _is_between_equals(self, module: str) -> bool:
        boundaries = self.boundaries[module]
        if not any(label_of(node).direction == "out" for node in boundaries):
            return False  # never called, or its result is no tensor
        if self.split is None:
            return True
        types, nodes = self.split.flow.types, self.stream.nodes if self.stream is not None else ()
        return all(
            node not in nodes
            and (
                types.get(node) is SpmdType.INVARIANT
                or (label_of(node).direction == "in" and node in self.split.flows.constant)
            )
            for node in boundaries
        )


def unsplit_attentions(
    model: nn.Module, traced: Trace, split: Split | None, is_sharded: Callable[[str], bool]
) -> list[str]:
    """Modules whose code multiplies two activations, or cannot be looked into, and of whose parameters less than half
    are sharded."""
    found = dict.fromkeys(traced.opaque.reasons)
    if split is not None:
        flows = split.flows
        for node in traced.nodes:
            # scores, or scores with values: no weight takes part
            if facts_of(node).contracts and sum(flows.is_activation(i) for i in node.all_input_nodes) > 1:
                found[flows.path[node]] = None
    sizes = {name: param.numel() for name, param in model.named_parameters()}  # no graph has those of an opaque module
    unsplit = []
    for module in found:
        while module and not any(is_within(name, module) for name in sizes):
            module = module.rpartition(".")[0]  # a module without parameters holds the product
        inside = {name: n for name, n in sizes.items() if is_within(name, module)}
        if 2 * sum(n for name, n in inside.items() if is_sharded(name)) < sum(inside.values()):
            unsplit.append(module)
    return unsplit


def gathered_alone(
    model: nn.Module, tp: int, judge: Callable[[Plan], Objection | None], kept: Collection[str]
) -> Derivation | None:
    """Of a model that cannot be traced: its layers with gathered outputs, and gathered parameters where these are few,
    which ask nothing of the code around them. None where nothing is split so."""
    modules, params = [name for name, _ in model.named_modules(remove_duplicate=False)], dict(model.named_parameters())

    def found(layers: Layers) -> Derivation:
        split = {id(model.get_parameter(name)) for name in parameters_of(layers)}
        sharded = [name for name, param in params.items() if id(param) in split]
        why = "the model cannot be traced"
        left = {name: why for name, param in params.items() if id(param) not in split}
        share = sum(params[name].numel() for name in sharded) / max(1, sum(p.numel() for p in params.values()))
        return Derivation(tp, by_pattern(layers, modules), "replicated", sharded, left, [1, tp], {}, {}, share=share)

    def extended(layers: Layers, more: Layers) -> Layers:
        return layers | accepted_layers(more, lambda more: judge(found(layers | more).plan()))

    attentions = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    first = gathered_layers(model, tp, lambda _: True, {}, kept)
    # torch's attention holds its query, key and value, of which no layer's output can be gathered
    first |= gathered_parameters(model, tp, lambda name: name.rpartition(".")[0] in attentions, first, kept)
    layers = extended({}, first)
    if found(layers).share < USEFUL:
        layers = extended(layers, gathered_parameters(model, tp, lambda _: True, layers, kept))
    return found(layers) if layers else None


def accepted_layers(layers: Layers, judge: Callable[[Layers], Objection | None]) -> Layers:
    """The layers that the judge leaves: those that it objects to are left out, and it is asked again. Where it names
    none of them, as of an error in backward, some are tried one after another."""
    for _ in range(ATTEMPTS):
        objection = judge(layers) if layers else None
        if objection is None:
            return layers
        kept = {name: style for name, style in layers.items() if not objection.concerns(f"{name}.weight")}
        if len(kept) == len(layers):
            return _tried_in_turn(layers, judge)
        layers = kept
    return {}


def _tried_in_turn(layers: Layers, judge: Callable[[Layers], Objection | None]) -> Layers:
    outermost = [name for name in layers if not any(is_within(name, other) for other in layers if other != name)]
    accepted: Layers = {}
    for layer in outermost[:ATTEMPTS] if len(outermost) > 1 else ():
        tried = accepted | {name: style for name, style in layers.items() if is_within(name, layer)}
        if judge(tried) is None:
            accepted = tried
    return accepted
