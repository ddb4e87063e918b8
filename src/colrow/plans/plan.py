"""The plan: an ordered mapping from module-name patterns to styles, and how the loss is computed.

A plan is data. It can be read, printed, compared and saved, and it is the only place that says how a module is split.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

from colrow.data.disk import write_result
from colrow.errors import PlanError, did_you_mean
from colrow.ops.float8 import Float8
from colrow.plans.fingerprint import Fingerprint
from colrow.plans.huggingface import huggingface_modules
from colrow.plans.loss import LOSSES, Loss
from colrow.plans.patterns import matches, matching, module_names, names_of_one, nearest
from colrow.plans.presets import PRESETS, preset_modules
from colrow.styles.base import ParameterLayout, Style, style_from_data
from colrow.styles.replicated import LEFT_OUT
from colrow.styles.site import Site
from colrow.yaml_text import read_text, read_yaml

if TYPE_CHECKING:
    from colrow.plans.derive_options import Styles

_log = logging.getLogger("colrow")
USEFUL = 0.6
"""Where a plan splits a smaller share of the parameters, it gets a warning: each rank holds and computes most of the
model as without tp."""
Resolved = Mapping[str, tuple[str, Style]]
"""Fully qualified module name to the key of the plan that matches it, and the style."""


@dataclass(frozen=True)
class Plan:
    """Styles by module name. A key's components are matched as torch's `parallelize_module` does: `*`, `net*`, `[1-2]`.

    Args:
        modules: patterns to styles. A style is a name, a mapping with `style` and its options, or one of torch's own
            `ParallelStyle` objects.
        loss: `vocab_parallel` (on logits that stay sharded over the vocabulary), `replicated` (on all logits), or
            `linear` (head and loss in one, no rank holds all logits; call `colrow.model_loss`).
        name: what to call the plan in messages.
        notes: parameters or modules to the reason why they are not split.
        fingerprint: of the model that the plan was made for, if it is known: the check notices another one.

    Raises:
        PlanError: an unknown style, option, placement or loss; the message names the nearest that exists.
    """

    modules: Mapping[str, Style]
    loss: Loss = "replicated"
    name: str = "plan"
    notes: Mapping[str, str] = field(default_factory=dict, compare=False)
    fingerprint: Fingerprint | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise PlanError(f"unknown loss {self.loss!r}{did_you_mean(str(self.loss), LOSSES)}")
        # names and mappings become styles once: whoever holds a plan holds styles
        styles = {str(key): style_from_data(value, str(key)) for key, value in self.modules.items()}
        object.__setattr__(self, "modules", styles)  # frozen

    @classmethod
    def preset(cls, name: str, loss: Loss = "vocab_parallel") -> Plan:
        """A shipped plan: `llama`, `llama-fast`, `llama-overlap` or `article`."""
        return cls(modules=preset_modules(name, loss), loss=loss, name=name)

    @classmethod
    def derive(
        cls,
        model: nn.Module,
        tp: int,
        *,
        styles: Styles | None = None,
        keep_whole: Sequence[str] = (),
        split: Sequence[str] = (),
        **options: Any,
    ) -> Plan:
        """The plan that the model's own graph gives, checked, and verified where the check leaves something unproven.

        What is wrong is left unsharded, and stands in the plan's notes with the reason. Where less than 60% of the
        parameters are split, the logger `colrow` warns of it. For the options see
        `derive.derivation.derive`.

        Args:
            styles: `plain`, `fast` (local tensors and explicit collectives), or `overlap` (fast, with chunks on the
                copy engines).
            keep_whole: modules or parameters that stay unsharded, as a plan's keys name them: `["blocks.*.attn"]`.
                What is split by the same heads or features stays unsharded with them.
            split: modules or parameters whose matrices must be split. These three are options of DeriveOptions too.

        Raises:
            PlanError: the model cannot be traced, or gets no fast styles though they are requested, or something in
                `split` cannot be split; the text names the parameter and the reason.
        """
        from colrow.derive.judged import derive_judged
        from colrow.plans.derive_options import DeriveOptions

        chosen: DeriveOptions = options.pop("options", None) or DeriveOptions()
        keep_whole, split = (*chosen.keep_whole, *keep_whole), (*chosen.split, *split)
        chosen = replace(chosen, styles=styles or chosen.styles, keep_whole=keep_whole, split=split)
        found = derive_judged(model, tp, options=chosen, **options)
        found.warn_of_small_share(type(model).__name__)
        return found.plan().made_for(model)

    @classmethod
    def from_huggingface(cls, model: nn.Module) -> Plan:
        """The plan that a Hugging Face model states for itself (see `plans.huggingface`). Where it names few of the
        model's parameters, the logger `colrow` warns of it."""
        plan = cls(modules=huggingface_modules(model), loss="replicated", name=f"huggingface:{type(model).__name__}")
        if (share := plan.named_share(model)) < USEFUL:
            _log.warning(
                "the plan that %s states for itself names modules with %.0f%% of the parameters (%s): the rest stays "
                "unsharded; Plan.derive may split more",
                type(model).__name__,
                100 * share,
                ", ".join(plan.modules) or "no module",
            )
        return plan

    @classmethod
    def from_yaml(cls, text: str, source: str = "plan") -> Plan:
        """The plan in a YAML text."""
        tree = read_yaml(text, source, PlanError)
        if not isinstance(tree, dict) or not isinstance(tree.get("modules"), dict):
            raise PlanError(f"{source} holds no plan: it needs the key modules, a mapping from module names to styles")
        known = {"name", "loss", "modules", "notes", "fingerprint"}
        for key in tree:
            if key not in known:
                raise PlanError(f"{source}: unknown key {key!r}{did_you_mean(str(key), known)}")
        if "fingerprint" in tree:
            tree["fingerprint"] = Fingerprint.from_data(tree["fingerprint"], source)
        return cls(**{"name": source, **tree})

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """The plan in a YAML file."""
        return cls.from_yaml(read_text(Path(path), "plan", PlanError), str(path))

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back to an equal plan."""
        tree: dict[str, Any] = {"name": self.name, "loss": self.loss}
        tree["modules"] = {key: style.to_data() for key, style in self.modules.items()}
        if self.notes:
            tree["notes"] = dict(self.notes)
        if self.fingerprint is not None:
            tree["fingerprint"] = self.fingerprint.to_data()
        return yaml.dump(tree, Dumper=_PlanDumper, sort_keys=False, width=120)

    def save(self, path: Path | str) -> None:
        """Write the plan as YAML."""
        write_result(Path(path), self.to_yaml())

    def made_for(self, model: nn.Module) -> Plan:
        """The plan with the model's fingerprint, by which the check notices that the model has changed."""
        return replace(self, fingerprint=Fingerprint.of(model))

    def with_fp8(self, recipe: Float8) -> Plan:
        """The plan with fp8 matmuls in all styles that have the option. Raises PlanError where none has."""
        able = {key: style for key, style in self.modules.items() if hasattr(style, "fp8")}
        if not able:
            raise PlanError(f"plan {self.name} has no style with the option fp8: take one of fast styles, llama-fast")
        changed: dict[str, Any] = {key: replace(style, fp8=recipe) for key, style in able.items()}  # type: ignore[call-arg]
        return replace(self, modules={**self.modules, **changed})

    def resolve(self, model: nn.Module, absent: Iterable[str] = ()) -> Resolved:
        """Fully qualified module name to (key, style), in the model's order. A module with several names is there under
        each of them, whichever the plan has.

        Args:
            absent: names of modules that the complete model has and this pipeline stage of it has not; a key may match
                these alone.

        Raises:
            PlanError: a key matches no module (the message names the nearest), a name matches two keys, or the names
                of one module get different styles.
        """
        names, elsewhere = module_names(model), tuple(absent)
        found: dict[str, tuple[str, Style]] = {}
        for key, style in self.modules.items():
            here = matching(key, names)
            if not here and not style.optional and not any(matches(key, name) for name in elsewhere):
                near = nearest(key, names)
                hint = f"; did you mean {near!r}?" if near else ""
                raise PlanError("CR101", f"plan {self.name}", f"key {key!r} matches no module{hint}", "")
            for name in here:
                if name in found:
                    message = f"module {name} matches two keys, {found[name][0]!r} and {key!r}"
                    raise PlanError("CR102", f"plan {self.name}", message, "keep one")
                found[name] = (key, style)
        # A module with several names has one class and one set of parameters: one style, under each of its names.
        for group in names_of_one(model):
            given = [found[name] for name in group if name in found]
            if len({repr(style) for _, style in given}) > 1:  # by text: styles with dicts as options have no hash
                message = f"{' and '.join(group)} are one module, and the plan gives them different styles"
                raise PlanError("CR103", group[0], message, "give every name of the module the same style, or name one")
            found |= dict.fromkeys(group, given[0]) if given else {}
        return {name: found[name] for name in names if name in found}

    def styles_of(self, model: nn.Module) -> dict[str, Style]:
        """The style of each module that has one, by its fully qualified name. Raises PlanError as `resolve` does."""
        return {name: style for name, (_, style) in self.resolve(model).items()}

    def check_shapes(self, model: nn.Module, tp: int, *, resolved: Resolved | None = None) -> None:
        """Raise PlanError, with the fix, for the first module whose style cannot work at this degree.

        Args:
            resolved: what `resolve` gave, where the caller has it.
        """
        resolved = self.resolve(model) if resolved is None else resolved
        for fqn, (_, style) in resolved.items():
            style.check(Site(model, fqn, tp))
            style.local_attributes(Site(model, fqn, tp))
        heads = [(fqn, style) for fqn, (_, style) in resolved.items() if style.returns_loss]
        if heads and self.loss != "linear":
            fqn, style = heads[0]
            message = f"it has style {style.name} and the plan's loss is {self.loss}"
            raise PlanError("CR211", fqn, message, "make it linear")
        # Both are views [B, T/n, D] of equal shape, and no operator would fail: the tokens in them differ.
        orders = {style.token_order: fqn for fqn, (_, style) in resolved.items()}
        if tp > 1 and {"flattened", "sequence"} <= orders.keys():
            raise PlanError(
                "CR211",
                f"plan {self.name}",
                f"{orders['flattened']} takes its shard of the flattened tokens and {orders['sequence']} its shard of "
                "each sequence, so tokens would be confused",
                "use fast styles in all places (norms: grad_sum; head: fast_head, or linear_head with layout "
                "flattened), or in none",
            )

    def parameters(self, model: nn.Module, tp: int, *, resolved: Resolved | None = None) -> dict[str, ParameterLayout]:
        """What each parameter of the model becomes over tp, by fully qualified name; no process group is needed.

        Args:
            resolved: what `resolve` gave, where the caller has it.
        """
        resolved = self.resolve(model) if resolved is None else resolved
        layouts: dict[str, ParameterLayout] = {}
        for fqn, module in model.named_modules():  # a shared module under its first name, as its parameters are
            if not any(True for _ in module.named_parameters(recurse=False)):
                continue
            _, style = resolved.get(fqn, ("", LEFT_OUT))
            site = Site(model, fqn, tp)
            style.check(site)
            # a style of activations alone leaves the parameters replicated
            own = style.parameters(site) or LEFT_OUT.parameters(site)
            layouts |= {f"{fqn}.{name}" if fqn else name: layout for name, layout in own.items()}
        return layouts

    def named_share(self, model: nn.Module) -> float:
        """The share of the model's parameters that lie in modules to which the plan gives a style."""
        named = set(self.resolve(model))
        sizes = {name: param.numel() for name, param in model.named_parameters()}
        return sum(n for name, n in sizes.items() if name.rpartition(".")[0] in named) / max(1, sum(sizes.values()))

    def sequence_parallel(self) -> bool:
        """Whether activations between blocks are shards of the tokens, so that tp must divide the sequence length."""
        return any(style.token_order for style in self.modules.values())

    def sequence_misfit(self, tp: int, seq_len: int, longest: int | None = None) -> tuple[str, str] | None:
        """What is wrong with a sequence of this length, and what to do; None where nothing is.

        Args:
            longest: positions that the model has.
        """
        if not self.sequence_parallel() or seq_len % tp == 0:
            return None
        below = seq_len // tp * tp
        near = [n for n in (below, below + tp) if n > 0 and (longest is None or n <= longest)]
        fix = f"use {' or '.join(map(str, near))}" if near else f"choose a tp up to {longest}"
        return f"seq_len={seq_len} is not divisible by tp={tp} (sequence parallel splits dim 1)", fix

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)


def is_preset(plan: Plan) -> bool:
    """Whether the plan has the styles of a shipped one, whatever its name and its loss."""
    return any(plan.modules == Plan.preset(name, loss).modules for name in PRESETS for loss in LOSSES)


class _PlanDumper(yaml.SafeDumper):
    """Plans read best with one line a module: inner mappings and lists in flow style."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        node = super().represent_mapping(tag, mapping, flow_style)
        node.flow_style = bool(isinstance(mapping, dict) and "style" in mapping)
        return node
