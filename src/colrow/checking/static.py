"""The static layer: names, sizes, types, ties, head and loss, from the plan and the model's modules alone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from colrow.checking.degrees import with_legal_degrees
from colrow.checking.finding import Finding, finding, finding_of
from colrow.dryrun.calls import most_positions, vocabulary
from colrow.errors import PlanError
from colrow.models.blocks import block_stacks
from colrow.parallel.parallelize import SAME_PLACEMENT, parallel_already, split_ties, tied_parameters
from colrow.plans.patterns import matching, module_names, names_of_one, nearest
from colrow.plans.plan import Plan, is_preset
from colrow.plans.presets import PRESETS
from colrow.styles.base import Style
from colrow.styles.linear import Colwise, Rowwise
from colrow.styles.site import PARAMETRIZATIONS, Site

FUSED = ("qkv", "c_attn", "w_pack", "query_key_value", "in_proj", "gate_up", "gate_and_up", "fc1_gate", "wi_fused")
"""Names of layers that hold several weights in one. The order of the rows is not known from the name."""


def check_static(model: nn.Module, plan: Plan, tp: int, seq_len: int) -> list[Finding]:
    """What is wrong with the plan, found without running anything."""
    names = list(_names(model, plan))
    styles = _resolve(model, plan)
    found = [*names, *_already(model, styles), *_shared(model, plan)]
    if any(f.code == "CR104" for f in found):
        return found
    sizes = [*_sites(model, styles, tp), *_sequence(model, plan, tp, seq_len)]
    found += with_legal_degrees(sizes, model, styles, lambda tp: plan.sequence_misfit(tp, seq_len) is None)
    found += [*_head(model, plan, styles), *_trains(model)]
    if not found:  # both ask for the layout of every parameter, which a plan with an error may not have
        found += [*_ties(model, plan, tp), *_splits_something(model, plan, tp)]
    return found + list(_changed(model, plan))


def fused_suspects(model: nn.Module, plan: Plan) -> list[Finding]:
    """Plain column splits of weights that, by their names, hold several: for models that no dry run can run."""
    found = []
    for fqn, style in _resolve(model, plan).items():
        last = fqn.rpartition(".")[2].lower()
        if isinstance(style, Colwise) and style.output_stays_sharded and any(word in last for word in FUSED):
            message = "by its name this weight holds several matrices, and a plain column split would mix them"
            found.append(finding("CR208", fqn, message, FUSED_FIX))
    return found


FUSED_FIX = (
    "use a style that splits each matrix on its own (see the page), or keep the matrices in modules of their own"
)


def _names(model: nn.Module, plan: Plan) -> Iterator[Finding]:
    """Keys that match nothing, and modules that match twice."""
    names, taken = module_names(model), dict[str, str]()
    lost = [key for key, style in plan.modules.items() if not style.optional and not matching(key, names)]
    if lost and plan.name in PRESETS and is_preset(plan):  # made for another model: one finding, not one for each key
        message = (
            f"{len(lost)} of the preset's {len(plan.modules)} keys match no module of the model, such as {lost[0]!r}"
        )
        derived = "plan: derive-fast" if plan.loss == "linear" else "plan: derive"  # plain styles have no such loss
        yield finding("CR101", f"plan {plan.name}", message, f"use {derived}, which reads the model itself")
        return
    for key, style in plan.modules.items():
        matches = matching(key, names)
        if not matches and not style.optional:
            fix = _fix_of_lost(nearest(key, names), [other for other in plan.modules if other != key], names)
            yield finding("CR101", key, f"the key {key!r} matches no module of the model", fix)
        again = [name for name in matches if name in taken]
        if again:
            message = f"module {again[0]} matches two keys, {taken[again[0]]!r} and {key!r}"
            yield finding("CR102", again[0], message, "keep one of the two keys")
        taken |= dict.fromkeys(matches, key)


def _fix_of_lost(hint: str | None, others: list[str], names: list[str]) -> str:
    """What to do with a key that matches nothing: the nearest name may be one that another key has already."""
    if hint is None:
        return "correct or remove the key"
    named = matching(hint, names)
    if again := next((other for other in others if matching(other, named)), None):
        return f"remove it: the nearest name, {hint!r}, is that of the key {again!r}"
    return f"use {hint!r}"


def _resolve(model: nn.Module, plan: Plan) -> dict[str, Style]:
    """Module name to style, as far as the keys are sound; the first key wins. A module has it under all its names."""
    found = _by_name(model, plan)
    for group in names_of_one(model):
        given = [found[name] for name in group if name in found]
        found |= dict.fromkeys(group, given[0]) if given else {}
    return found


def _by_name(model: nn.Module, plan: Plan) -> dict[str, Style]:
    names, found = module_names(model), dict[str, Style]()
    for key, style in plan.modules.items():
        for name in matching(key, names):
            found.setdefault(name, style)
    return found


def _already(model: nn.Module, styles: dict[str, Style]) -> Iterator[Finding]:
    for error in parallel_already(model, styles):
        yield finding_of(error, "model")


def _shared(model: nn.Module, plan: Plan) -> Iterator[Finding]:
    styles = _by_name(model, plan)
    for group in names_of_one(model):
        declared = {name: styles[name] for name in group if name in styles}
        if len({repr(style) for style in declared.values()}) > 1:
            each = ", ".join(f"{name}: {style.name}" for name, style in declared.items())
            message = f"{' and '.join(group)} are one module, and the plan gives them different styles ({each})"
            yield finding("CR103", group[0], message, "give every name of the module the same style, or name one")


def _sites(model: nn.Module, styles: dict[str, Style], tp: int) -> Iterator[Finding]:
    """Each style on its module: types, options, divisibility."""
    for fqn, style in styles.items():
        module = model.get_submodule(fqn)
        if isinstance(module, nn.Linear) and isinstance(style, Colwise | Rowwise):
            # an adapter (LoRA) adds the output of its own linears. Torch's row split registers weight and bias alone,
            # and the dry run judges what the adapter makes of the layer's input
            children = [name for name, _ in module.named_children() if name != PARAMETRIZATIONS]
            if children and isinstance(style, Colwise):
                message = f"{type(module).__name__} is a linear layer with modules inside it ({', '.join(children)})"
                fix = "name the linear layers inside it, or keep the adapter beside the layer"
                yield finding("CR207", fqn, message, fix)
                continue
            extent = module.out_features if isinstance(style, Colwise) else module.in_features
            buffers = [name for name, buffer in module.named_buffers(recurse=False) if extent in buffer.shape]
            if buffers:
                message = (
                    f"the buffer {buffers[0]} has the size {extent} that style {style.name} splits, and stays unsharded"
                )
                fix = "make it a parameter, or leave the module out of the plan"
                yield finding("CR212", fqn, message, fix)
                continue
        try:
            style.check(Site(model, fqn, tp))
        except PlanError as error:
            yield finding_of(error, fqn)


def _sequence(model: nn.Module, plan: Plan, tp: int, seq_len: int) -> Iterator[Finding]:
    if (misfit := plan.sequence_misfit(tp, seq_len, most_positions(model))) is not None:
        yield finding("CR205", "input", *misfit)


def _head(model: nn.Module, plan: Plan, styles: dict[str, Style]) -> Iterator[Finding]:
    """The head and the loss must agree on how the logits are placed."""
    head = head_of(model)
    style = styles.get(head) if head else None
    if head is None or not isinstance(style, Colwise):
        return
    split, local, parallel = style.output_stays_sharded, style.use_local_output, plan.loss == "vocab_parallel"
    if split and local:
        message = (
            "the head returns this rank's shard of the logits as a plain tensor, and the loss uses it as all logits"
        )
        fix = "set use_local_output: false with loss: vocab_parallel, or output: replicate with loss: replicated"
        yield finding("CR301", head, message, fix)
    elif not split and parallel:
        message = "the head gathers the logits, so loss: vocab_parallel saves no memory"
        fix = "drop output and set use_local_output: false on the head, or set loss: replicated"
        yield finding("CR302", head, message, fix)
    elif not local and not parallel:
        message = "the head returns logits as a DTensor, and the ordinary cross entropy takes plain tensors"
        yield finding(
            "CR303", head, message, "set loss: vocab_parallel, or output: replicate and use_local_output: true"
        )


def head_of(model: nn.Module) -> str | None:
    """The linear layer that makes logits: as wide as the vocabulary, outside of the repeated blocks."""
    vocab = vocabulary(model)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == vocab
        and not any(p.isdigit() for p in name.split("."))
    ]
    return names[-1] if names else None


def _ties(model: nn.Module, plan: Plan, tp: int) -> Iterator[Finding]:
    for names, different in split_ties(model, plan.parameters(model, tp)):
        yield finding("CR304", names[0], f"tied weights get different placements ({different})", SAME_PLACEMENT)


def check_stages(model: nn.Module, stages: int) -> list[Finding]:
    """Tied weights that a pipeline of `stages` stages separates."""
    if stages == 1:
        return []
    found = []
    for group in tied_parameters(model):
        places = {_place(model, name) for name in group}
        if len(places) > 1:
            message = (
                f"{' and '.join(group)} are one weight, and with {stages} stages they become copies: each would get "
                "one term of the gradient"
            )
            fix = "sum the copies' gradients over their stages before clipping and the step, as `colrow train` does"
            found.append(finding("CR307", group[0], message, fix))
    return found


def _place(model: nn.Module, name: str) -> str:
    """The block that holds a parameter, or whether it comes before or after the blocks in the model."""
    blocks = [fqn for stack in block_stacks(model) for fqn, _ in stack.named_blocks()]
    for block in blocks:
        if name.startswith(block + "."):
            return block
    order = [fqn for fqn, _ in model.named_modules(remove_duplicate=False)]
    return "before" if not blocks or order.index(name.rpartition(".")[0]) < order.index(blocks[0]) else "after"


def _splits_something(model: nn.Module, plan: Plan, tp: int) -> Iterator[Finding]:
    if tp > 1 and all(layout.placement.is_replicate() for layout in plan.parameters(model, tp).values()):
        message = f"no parameter is split over tp={tp}: each rank holds and computes the complete model"
        yield finding("CR105", f"plan {plan.name}", message, "use another plan, or tp=1")


def _changed(model: nn.Module, plan: Plan) -> Iterator[Finding]:
    """A model that is not the one that the plan was made for."""
    if plan.fingerprint is not None and (differences := plan.fingerprint.differences(model)):
        message = f"the model is not the one that the plan was made for: {'; '.join(differences)}"
        fix = "derive or write the plan again, or take its key fingerprint out of the file"
        yield finding("CR106", f"plan {plan.name}", message, fix)


def _trains(model: nn.Module) -> Iterator[Finding]:
    if any(True for _ in model.parameters()) and not any(param.requires_grad for param in model.parameters()):
        yield finding("CR505", "model", "every parameter is frozen", "set requires_grad on what is to be trained")
