"""Styles of modules whose parameters every rank holds: `replicate`, `grad_sum`, `kv_replicate`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from colrow.sharding.placements import parse_placement
from colrow.styles.base import NegativeControl, OutputSegment, ParameterLayout, Style, replicated
from colrow.styles.heads import Heads, heads_of
from colrow.styles.linear import Colwise
from colrow.styles.options import option
from colrow.styles.rank_tensors import gathered
from colrow.styles.shards import ShardSpec, shard_parameters
from colrow.styles.site import Site


class _ReplicatedStyle(ParallelStyle):
    """Places the module's own parameters, all by one spec, and gathers the first input."""

    def __init__(self, spec: ShardSpec, input_layout: Placement | None = None) -> None:
        self.spec, self.input_layout = spec, input_layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        names = [name for name, _ in module.named_parameters(recurse=False)]
        shard_parameters(module, device_mesh, dict.fromkeys(names, self.spec), self.src_data_rank)
        layout = self.input_layout
        if layout is not None:
            module.register_forward_pre_hook(lambda _, args: (gathered(args[0], device_mesh, layout), *args[1:]))
        return module


@dataclass(frozen=True, kw_only=True)
class Replicated(Style):
    """Parameters replicated and used alike on every rank: nothing is communicated. `parallelize` gives this style to
    every module that the plan leaves out, so that all parameters live on one mesh."""

    name = "replicate"
    negative_control = NegativeControl("grad_sum", "gradients summed over tp, but equal on all ranks")

    def build(self, site: Site) -> ParallelStyle:
        return _ReplicatedStyle(ShardSpec(summed=False))

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return replicated(site.module, "not in the plan: replicated")


LEFT_OUT = Replicated()
"""The style of a module that the plan leaves out."""


@dataclass(frozen=True, kw_only=True)
class GradSum(Style):
    """Parameters replicated but used on this rank's shard of the activations (q/k norms on local heads): forward is
    local, gradients are summed over tp."""

    name = "grad_sum"
    sums_gradients = True
    negative_control = NegativeControl("replicate", "style grad_sum left out")

    def build(self, site: Site) -> ParallelStyle:
        return _ReplicatedStyle(ShardSpec())  # summed, as a spec without a dim is

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return replicated(site.module, "used on this rank's shard; gradients summed over tp")


@dataclass(frozen=True, kw_only=True)
class KvReplicate(Style):
    """A k or v projection: split by kv heads where tp divides them; otherwise replicated, and each rank computes the
    kv heads that its query heads need. Gradients of a head are summed over the ranks that use it.

    `heads`, `kv_heads`, `head_dim` come from the model's config unless given.
    """

    name = "kv_replicate"
    computes_module = True
    sums_gradients = True
    gathers_own_input = True
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    input: Placement | None = option(parse_placement)

    def resolve(self, site: Site) -> Heads:
        """The head counts at this site. Raises PlanError when nothing states them, or they do not fit."""
        known = heads_of(site.model)
        query = self.heads or (known.query if known else None)
        kv = self.kv_heads or (known.kv if known else None)
        dim = self.head_dim or (known.dim if known else None)
        if query is None or kv is None or dim is None:
            raise site.wrong_options(
                f"style {self.name} needs the head counts and the model has no config that states them",
                "give the options heads, kv_heads and head_dim",
            )
        module = site.require(self.name, nn.Linear)
        if module.out_features != kv * dim:
            raise site.wrong_options(
                f"out_features={module.out_features} is not kv_heads={kv} × head_dim={dim}",
                "correct kv_heads or head_dim, or take another style where this is no k or v projection",
            )
        site.divide(query, "CR202", f"n_heads={query}")
        return Heads(query, kv, dim)

    def check(self, site: Site) -> None:
        self.resolve(site)

    def build(self, site: Site) -> ParallelStyle:
        heads = self.resolve(site)
        if heads.kv % site.tp == 0:
            return Colwise(input=self.input).build(site)
        # every rank holds all rows and uses those of its heads: neighbours' rows may overlap
        spec = ShardSpec(0, (heads.kv * heads.dim,), kv=(0,), heads=heads.query, kv_heads=heads.kv)
        return _ReplicatedStyle(spec, self.input or Replicate())

    def output_segments(self, site: Site) -> tuple[OutputSegment, ...]:
        heads = self.resolve(site)
        local = heads.kv // site.tp if heads.kv % site.tp == 0 else len(heads.kv_heads_of_rank(site.tp, 0))
        return (OutputSegment(heads.kv * heads.dim, local * heads.dim, heads.kv == 1),)

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        heads = self.resolve(site)
        if heads.kv % site.tp == 0:
            return Colwise().parameters(site)
        return replicated(site.module, f"n_kv_heads={heads.kv} not divisible by tp={site.tp}; gradients summed over tp")
