"""Derive a plan: trace, infer axes, choose, find blocks and stream, check the trace on local shapes, write styles."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from colrow.derive.axes import forbid
from colrow.derive.blocks import SplitError
from colrow.derive.choice import Choice, why_unsharded
from colrow.derive.choose import choose, legal_degrees
from colrow.derive.elimination import at_fault, parameters_of_each
from colrow.derive.emit import Emitter
from colrow.derive.emit_fast import FastEmitter
from colrow.derive.emit_modules import Emission
from colrow.derive.failure import TraceError, has_unknown_size, unknown_size
from colrow.derive.flow import Flows
from colrow.derive.gathered import (
    Layers,
    Standing,
    accepted_layers,
    gathered_alone,
    gathered_layers,
    gathered_parameters,
    parameters_of,
    unsplit_attentions,
)
from colrow.derive.infer import OPAQUE, AxisInference, module_path
from colrow.derive.local import LocalCheck, Repairs
from colrow.derive.opaque import NOTHING_OPAQUE, opaque_modules
from colrow.derive.representatives import NotAlikeError, Representatives
from colrow.derive.requests import Requests
from colrow.derive.result import Derivation
from colrow.derive.sequence import Stream, find_stream
from colrow.derive.split import Split
from colrow.derive.stream_ends import NoStreamError, StreamKind
from colrow.derive.table import infer
from colrow.derive.trace import Trace, default_inputs, label_of, trace
from colrow.dryrun.calls import GivenInputs, Inputs
from colrow.errors import PlanError
from colrow.ops.carriers import Overlap
from colrow.plans.derive_options import DeriveOptions
from colrow.plans.patterns import by_pattern, is_within, with_stars
from colrow.plans.plan import USEFUL, Plan
from colrow.styles.fast.head import FastHead
from colrow.styles.linear import Colwise

if TYPE_CHECKING:
    from colrow.derive.judged import Objection

Judge = Callable[[Plan], "Objection | None"]
ATTEMPTS = 16
"""After as many plans that fail, all that is left is given up."""
UNUSED = "the model's forward does not use it"


def derive(
    model: nn.Module,
    tp: int,
    *,
    inputs: GivenInputs | None = None,
    options: DeriveOptions | None = None,
    traced: Trace | None = None,
    judge: Judge | None = None,
    prove: Judge | None = None,
) -> Derivation:
    """A plan for `model` at degree `tp`, from its graph.

    Args:
        model: any module, on any device (the meta device included). It is left as it was.
        inputs: example inputs, [batch, sequence, ...] first (see [Note: example inputs]). The sequence must be
            divisible by tp, and batch and sequence unlike any dimension of the model.
        options: what the plan may use.
        traced: the trace of `model` on `inputs`, when there is one already (of another degree).
        judge: what it objects to is given up: first the sequence shards, then the classes of the modules it names.
        prove: asked of the plan that comes out. It takes far longer than the judge and seldom objects; where it does,
            it is the judge from there on.

    Raises:
        PlanError: the model cannot be traced, or has sizes that depend on the data, or fast styles are requested
            and do not fit, or `options.split` cannot be split; the text says why.
    """
    options = options or DeriveOptions()
    options.check()
    requests = Requests.of(model, options)
    if tp == 1 and options.styles == "plain":
        names = [name for name, _ in model.named_parameters()]
        return Derivation(1, {}, options.loss, [], dict.fromkeys(names, "tp is 1"), [1], {}, {})
    given = default_inputs(model, tp) if inputs is None else Inputs.of(inputs)
    given.require_tensors(model)
    wanted = _Wanted(tp, given, options, judge, prove, requests)
    # a trace that is handed in has all blocks: see [Note: representatives]
    exported = Representatives(model, model) if traced else Representatives.of(model, given, requests)
    try:
        found = _derive(exported, traced, wanted)
    except NotAlikeError:
        found = _derive(Representatives(model, model), None, wanted)
    requests.require(found.sharded, found.replicated, tp)
    return found


@dataclass(frozen=True)
class _Wanted:
    """The plan that is wanted: the arguments of `derive` beside the model."""

    tp: int
    inputs: Inputs
    options: DeriveOptions
    judge: Judge | None
    prove: Judge | None
    requests: Requests


def _derive(exported: Representatives, traced: Trace | None, wanted: _Wanted) -> Derivation:
    """Modules that cannot be traced are found one after another, each by an export that fails."""
    model, inputs, opaque = exported.model, wanted.inputs, NOTHING_OPAQUE
    while True:
        try:
            traced = traced or trace(model, inputs, opaque=opaque)
            return _Derive(exported, traced, wanted).run()
        except TraceError as error:
            try:
                opaque, traced = opaque_modules(model, inputs, error, opaque), None
            except TraceError:  # no module is at fault that could be left out: the code between them is
                if (found := _untraced(exported, wanted)) is None:
                    raise
                found.notes.append(str(error))
                return found
        except GuardOnDataDependentSymNode as error:
            assert traced is not None
            opaque, traced = opaque_modules(model, inputs, _of_unknown_size(model, traced, error), opaque), None


def _untraced(exported: Representatives, wanted: _Wanted) -> Derivation | None:
    """None where nothing is split, where nobody judges it, or where fast styles are wanted."""
    judge = wanted.prove or wanted.judge
    if judge is None or wanted.options.styles != "plain":
        return None
    return gathered_alone(exported.complete, wanted.tp, judge, wanted.requests.kept)


def _of_unknown_size(model: nn.Module, traced: Trace, error: Exception) -> TraceError:
    first = next((n for n in traced.nodes if n.op == "call_function" and has_unknown_size(n)), None)
    return unknown_size(model, module_path(first) if first is not None else "", error)


class _Derive:
    def __init__(self, exported: Representatives, traced: Trace, wanted: _Wanted) -> None:
        self.exported, self.model, self.traced = exported, exported.model, traced
        self.tp, self.inputs, self.options = wanted.tp, wanted.inputs, wanted.options
        self.judge, self.prove, self.requests = wanted.judge, wanted.prove, wanted.requests
        self.refused = dict[str, str]()
        self.fast = self.options.styles != "plain"
        self.failed: list[tuple[LocalCheck, TraceError]] = []
        self.inference: AxisInference = infer(traced)
        self.notes = [*dict.fromkeys(traced.opaque.reasons.values()), *self.requests.keep(self.inference)]

    def run(self) -> Derivation:
        found = self._complete()
        if self.prove is None or not found.modules or self.prove(found.plan()) is None:
            return found
        # where this plan is wrong, those on the way to it may be too
        self.judge, self.prove = self.prove, None
        return self._complete()

    def _complete(self) -> Derivation:
        found = self._found()
        return found if self.judge is None or self.fast else self._with_gathered(found)

    def _with_gathered(self, found: Derivation) -> Derivation:
        """Of a plan that splits little, or little of an attention: more layers of which the output is gathered, and
        where that leaves it so, parameters that are, where the judge allows it. A module that gathers sequence shards
        for itself can have neither: where too little is split with these, it is tried without them."""
        best = self._gathered(found)
        if best.share >= USEFUL or not found.sequence_parallel:
            return best
        try:
            without = self._without_stream(found.made[0])
        except SplitError:
            return best
        if self._objection(without) is not None:
            return best
        without = self._gathered(without)
        if without.share <= best.share:
            return best
        return self._noted(without, ["no sequence shards: without them more parameters are gathered"])

    def _gathered(self, found: Derivation) -> Derivation:
        split, stream, _ = found.made
        standing = Standing(self.traced, split, stream)
        found = self._extended(found, gathered_layers, standing)
        return self._extended(found, gathered_parameters, standing.is_equal)

    def _extended(
        self, found: Derivation, candidates: Callable[..., Layers], stands: Callable[[str], bool]
    ) -> Derivation:
        choice, (split, stream, emission) = found.choice, found.made
        assert choice is not None
        scopes = (
            [""]
            if found.share < USEFUL
            else unsplit_attentions(self.model, self.traced, split, set(found.sharded).__contains__)
        )

        def extended(layers: Layers) -> Derivation:
            gathered = emission.gathered | parameters_of(layers)
            return self._result(
                choice, split, stream, replace(emission, modules=emission.modules | layers, gathered=gathered)
            )

        def in_scope(name: str) -> bool:
            return any(not scope or is_within(name, scope) for scope in scopes) and stands(name)

        layers = candidates(self.model, self.tp, in_scope, emission.modules, self.requests.kept)
        layers = accepted_layers(layers, lambda layers: self._objection(extended(layers)))
        return extended(layers) if layers else found

    def _found(self) -> Derivation:
        # Each round splits less: what fails is forbidden, and the next choice is made without it.
        for attempt in itertools.count():
            choice = choose(
                self.inference,
                self.tp,
                normalised=self.options.wide_norms,
                preferred=self.requests.preferred(self.inference),
                volume=self.exported.volume,
            )
            for names in parameters_of_each(self.inference, choice).values():
                self.exported.require_separate(names)
            if not choice.atoms and not choice.groups:
                if self.fast:
                    raise self._not_fast([*self.notes, "nothing can be split"])
                return self._result(choice, None, None, Emission())
            try:
                return self._attempt(choice)
            except SplitError as error:
                # each attempt costs a trace: a model where this many modules fail, one after another, stays unsharded
                self._give_up(choice, error if attempt < ATTEMPTS else SplitError(set(), error.why))
        raise AssertionError("each attempt gives up at least one class")

    def _give_up(self, choice: Choice, error: SplitError) -> None:
        atoms = [a for a in error.atoms if a in choice.atoms or a in choice.groups] or [*choice.atoms, *choice.groups]
        for atom in atoms:
            if atom in choice.groups:  # kv heads and their query heads are split together, or not at all
                forbid([choice.groups[atom]], error.why)
            forbid([atom], error.why)
        self.notes.append(error.why)

    def _split(self, choice: Choice) -> Split:
        wide = {module_path(n) for n, dims in self.inference.averaged.items() if choice.any_sharded(dims)}
        return Split.of(Flows(self.inference, choice, wide, self.traced.ties), column_blocks=self.fast)

    def _attempt(self, choice: Choice) -> Derivation:
        split, why, objection = self._split(choice), list[str](), None
        if self.options.sequence_parallel:
            for found in self._sequence_parallel(split, why):
                objection = self._objection(found)
                if objection is None:
                    return self._noted(found, why)
                why.append(f"no sequence shards: {objection.why}")
                if not self.fast and not self._is_of_the_stream(split, objection):
                    raise self._given_up(split, objection)
        if self.fast and objection is not None:  # on every stream: fast styles need one
            raise self._given_up(split, objection)
        found = self._without_stream(split)  # raises where no style fits the split: then less is split, fast or plain
        if self.fast:
            raise self._not_fast(why)
        if (objection := self._objection(found)) is not None:
            raise self._given_up(split, objection)
        return self._noted(found, why)

    def _noted(self, found: Derivation, why: list[str]) -> Derivation:
        found.notes = [*why, *found.notes]
        return found

    def _without_stream(self, split: Split) -> Derivation:
        try:
            return self._emit(split, None, None)[0]
        except PlanError as error:
            module = error.module if isinstance(error, TraceError) else None
            raise SplitError(self._suspects(split, module), str(error)) from error

    def _objection(self, found: Derivation) -> Objection | None:
        return self.judge(found.plan()) if self.judge else None

    def _is_of_the_stream(self, split: Split, objection: Objection) -> bool:
        """Whether the plan without sequence shards is free of it."""
        try:
            without = self._objection(self._without_stream(split))
        except SplitError:
            return True
        return without is None or without.places != objection.places

    def _given_up(self, split: Split, objection: Objection) -> SplitError:
        self.refused[objection.places[0]] = objection.why
        atoms: set[Any] = set()
        for node, name in self.inference.params.items():
            if objection.concerns(name):
                atoms |= split.finder.atoms_of({node})
        if not atoms and not self.fast:
            atoms = at_fault(self.inference, split.flows.choice, self._is_right)
        # an error that no module has: the model's code may not know logits of a part of the vocabulary
        return SplitError(atoms or {*split.flows.choice.vocabulary}, objection.why)

    def _is_right(self, choice: Choice) -> bool:
        try:
            return self._objection(self._without_stream(self._split(choice))) is None
        except SplitError:
            return False

    def _sequence_parallel(self, split: Split, why: list[str]) -> Iterator[Derivation]:
        """Derivations with the stream on sequence shards, from the widest part of the model to narrower ones; `why`
        gets what is in the way."""
        for before_norm in (False, True):
            late = self._stream(split, StreamKind(False, before_norm, self.fast), None, why)
            # an encoder and a decoder start at two places: the first layer alone is not enough, their embedding may be
            early = self._stream(split, StreamKind(True, before_norm, self.fast), late[1] if late else None, why)
            yield from (found for found, _ in filter(None, (early, late)))

    def _stream(
        self, split: Split, kind: StreamKind, known: Repairs | None, why: list[str]
    ) -> tuple[Derivation, Repairs] | None:
        """The derivation with the stream on sequence shards; None, and the reason in `why`, where there is none."""
        try:
            return self._emit(split, find_stream(self.traced, split, kind), known)
        except (NoStreamError, SplitError, PlanError) as error:
            start = "the embedding" if kind.starts_at_embedding else "the first layer"
            end = "the last norm" if kind.ends_before_norm else "the head"
            why.append(f"no sequence shards from {start} to {end}: {error}")
            return None

    def _not_fast(self, why: list[str]) -> PlanError:
        reason = why[0].removeprefix("no sequence shards ") if why else "no reason is known"
        return PlanError(
            f"{type(self.model).__name__} gets no fast styles, under which tokens are flattened from one end of a "
            f"model to the other: {reason}: use plan derive, whose styles are plain"
            f"{', with loss vocab_parallel' if self.options.loss == 'linear' else ''}"
        )

    def _suspects(self, split: Split, module: str | None) -> set[Any]:
        """Classes whose weights lie in the module that fails and in those at its place in other layers, or in the
        smallest module around it that has some; for the model's own code, those that it meets; all that are no
        vocabulary where no module is known."""
        choice = split.flows.choice
        if module == "":
            own = {n for n, path in split.flows.path.items() if path == "" and n.op == "call_function"}
            if met := split.finder.atoms_of(own) - choice.vocabulary:
                return met
        while module:
            found = split.atoms_at(module)
            if found:
                return found - choice.vocabulary or found
            module = module.rpartition(".")[0]
        return (choice.atoms | set(choice.groups)) - choice.vocabulary or set(choice.atoms)

    def _emit(self, split: Split, stream: Stream | None, known: Repairs | None) -> tuple[Derivation, Repairs]:
        emission = self._emission(self.model, self.traced, split, stream)
        repairs = self._repairs(LocalCheck(self.model, self.traced, split.flows, emission, stream, self.inputs), known)
        repairs.write_to(emission.modules)
        # The split was made, and tried, with logits that stay split; a loss on complete logits only gathers them.
        if self.options.loss == "replicated" and emission.loss == "vocab_parallel":
            for name, style in emission.modules.items():
                if emission.style(name) is Colwise and style.get("use_local_output") is False:
                    style.pop("use_local_output")
                    style["output"] = "replicate"
                if emission.style(name) is FastHead:
                    style["gather"] = True
            emission.loss = "replicated"
        return self._result(split.flows.choice, split, stream, emission), repairs

    def _repairs(self, check: LocalCheck, known: Repairs | None) -> Repairs:
        """What makes a rank's code right; of an attempt that fails like an earlier one, that one's error."""
        for other, error in self.failed if known is None else ():
            if other.flows is check.flows and check.fails_like(other):
                raise error
        try:
            return check.repair(known)
        except TraceError as error:
            self.failed.append((check, error))
            raise

    def _emission(self, *given: Any) -> Emission:
        if not self.fast or given[-1] is None:  # fast styles work on a stream
            return Emitter(*given).run()
        overlap: Overlap = "copy_engine" if self.options.styles == "overlap" else "collectives"
        return FastEmitter(*given, overlap=overlap, linear_loss=self.options.loss == "linear").run()

    def _result(self, choice: Choice, split: Split | None, stream: Stream | None, emission: Emission) -> Derivation:
        reasons = self._reasons(choice, split, stream, emission)
        sharded, replicated, elements, total = [], {}, 0, 0
        for name, param in self.exported.complete.named_parameters():
            own = self.exported.name(name)
            own = self.traced.ties.get(own, own)
            total += param.numel()
            if (reason := reasons.get(own, UNUSED)) is None:
                sharded.append(name)
                elements += 0 if emission.selects_rows(own, self.tp) else param.numel()
            else:
                replicated[name] = reason
        reductions, calls = Counter[str](), Counter[str]()
        borders = split.borders()[1] if split else set()
        for label in (label_of(node) for node in self.traced.nodes if node in borders):
            if label.path == "0":  # a module's first result stands for the module
                reductions[with_stars(label.module)] += self.exported.count(label.module, calls[label.module])
                calls[label.module] += 1
        names = [name for name, _ in self.exported.complete.named_modules(remove_duplicate=False)]
        return Derivation(
            tp=self.tp,
            modules=by_pattern(self.exported.spread(emission.modules, names), names),
            loss=emission.loss,
            sharded=sharded,
            replicated=replicated,
            legal=legal_degrees(self.inference, choice),
            reductions=dict(reductions),
            unknown={name: n for name, n in self.inference.unknown.items() if name != OPAQUE},
            notes=list(self.notes),
            refused=dict(self.refused),
            sequence_parallel=stream is not None,
            share=elements / max(1, total),
            choice=choice,
            trace=self.traced,
            made=(split, stream, emission),
        )

    def _reasons(
        self, choice: Choice, split: Split | None, stream: Stream | None, emission: Emission
    ) -> dict[str, str | None]:
        """Each exported parameter, by its first name, to the reason why it is not sharded; None where it is."""
        summed = (split.flow.summed if split else set()) | (stream.summed if stream else set())
        found: dict[str, str | None] = {}
        for node, name in self.inference.params.items():
            dims = self.inference.of(node)
            if choice.any_sharded(dims) or name in emission.gathered:
                found[name] = None
            else:
                why = self.traced.opaque.reason_of(name)
                found[name] = why or why_unsharded(dims, self.tp, self.notes, name in summed)
        return found
