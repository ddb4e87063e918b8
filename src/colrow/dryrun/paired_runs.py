"""The run of one rank, judged beside the unsharded run on record (`unsharded_run`); see [Note: values by number].

A style's own arithmetic is trusted, with the layout that the style states or that its module's output shows. Operators
on DTensors are DTensor's affair.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from colrow.dryrun.module_tracker import LOSS
from colrow.dryrun.numbered import NumberedRun, NumberedValue, Operation, shape_of
from colrow.dryrun.on_dtensors import DRAWN_IN_BACKWARD, LossGradients, not_as_in_one_process, takes_all_for_none
from colrow.dryrun.shown_layout import layout_shown
from colrow.dryrun.unproven import Reports, Unproven
from colrow.dryrun.unsharded_run import Recorded, UnshardedRun
from colrow.sharding.draws import Draw, may_draw, memory_order
from colrow.sharding.local_call import LocalCall, TensorShape, UnprovenError
from colrow.sharding.local_layout import (
    PARTIAL,
    REPLICATED,
    STYLE,
    UNKNOWN,
    Kind,
    Layout,
    after_collective,
    layout_of,
    sharded,
)
from colrow.sharding.operators import Filling, operator
from colrow.sharding.shard_rules import proven_layouts
from colrow.sharding.zeros import layout_of_zeros, makes_zeros
from colrow.styles.base import OutputSegment, Style
from colrow.styles.local_module import watched_sums
from colrow.styles.rank_tensors import HEADS_OF_RANK, RANK_TABLES
from colrow.torch_compat import current_autograd_node, forward_number, watched_conversions


class ShardedRun(NumberedRun):
    """One rank's run; `reports` has what nothing allows.

    Args:
        flattened: the length of sequences whose tokens lie flattened, or 0; see [Note: two views of flattened tokens].
        sequences: in the second view of that note, how many a rank has and how many all.

    Attributes:
        draws: what each call of a module's own code draws by element in forward, in order, by the module and
            its n-th call.
    """

    def __init__(
        self,
        model: nn.Module,
        unsharded: UnshardedRun,
        mesh: DeviceMesh,
        styles: Mapping[str, Style],
        segments: Mapping[str, tuple[OutputSegment, ...]],
        flattened: int = 0,
        sequences: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(model)
        self._flattened, self._sequences = flattened, sequences
        self.reports = Reports()
        self.draws: dict[tuple[str, int], list[Draw]] = defaultdict(list)
        self._unsharded, self._mesh, self._ranks = unsharded, mesh, mesh.size()
        self._computed_by_style = {
            name
            for name, style in styles.items()
            if style.computes_module and next(model.get_submodule(name).children(), None) is None
        }
        made = ("output", "input gradient")  # by the style's own arithmetic
        self._made_by_style = {(side, name) for side in made for name in self._computed_by_style}
        self._used_outside = {(name, "output", i) for name, style in styles.items() for i in style.used_outside or ()}
        self._left_blocks: set[Any] = set()  # the numbers of these outputs
        self._gradients_from_outside: set[tuple[Any, ...]] = set()
        self._given: dict[tuple[Any, ...], Tensor] = {}  # inputs of modules, before the hooks of their styles
        self._in_blocks = WeakTensorKeyDictionary()  # what these hooks hand to a block's own code in their place
        # Gradients of such a tensor: terms of the unsharded one's, which has that of a residual past the block too.
        self._terms: set[tuple[Any, ...]] = set()
        self._segments = segments
        self._answers: dict[LocalCall, list[Layout] | UnprovenError] = {}
        self._used: dict[Any, list[Recorded]] = defaultdict(list)
        self._first_layouts: dict[int, Layout] = {}  # by autograd node: of the operator's first input
        self._zeros: set[Any] = set()  # numbers
        self._loss_gradients = LossGradients()
        self._differing: dict[Any, str] = {}  # numbers of tensors that a write has reached in one run alone

    def report(self, operator: str, reason: str, where: str | None = None, dim: int | None = None) -> None:
        """Something is not proven: here, unless `where` says."""
        call_site = self.call_site()
        line = call_site.line if where is None else ""
        self.reports.found.append(Unproven(operator, call_site.module if where is None else where, line, reason, dim))

    def numbers_written(self, tensor: Tensor) -> tuple[Any, ...] | None:
        written, (held, all_of_them) = super().numbers_written(tensor), self._sequences
        # a number of sequences, which on real ranks counts all
        return (all_of_them,) if written == (held,) else written

    # -- operators

    def ran(self, operation: Operation, key: tuple[Any, ...]) -> None:
        call_site = self.call_site()
        self._note_reads(operation)
        recorded = self._counterpart(operation, key)
        numbers = recorded.numbers if recorded else [None] * len(operation.results)
        self._note_differing(operation, recorded, numbers)
        backward = current_autograd_node() is not None
        if operation.values and not backward:
            self._first_layouts.setdefault(forward_number(), operation.values[0].layout)
        if any(isinstance(x, DTensor) for x in (*operation.leaves, *operation.results)):
            self._ran_on_dtensors(operation, recorded, numbers)
            self._note_draw(operation, recorded, self.number(operation.results[0]).layout)
        elif call_site.in_style and self._ran_in_style(operation, backward):
            return
        elif (collective := operator(operation.name).collective) and operation.func.namespace == "_c10d_functional":
            self._collective(operation, collective)
        else:
            zeros = self._makes_zeros(operation, recorded)
            found = self._layouts(operation, recorded, call_site, backward, zeros)
            self._note_writes(operation, found)
            self._note_draw(operation, recorded, found[0])
            if zeros or operator(operation.name).fills is Filling.ZERO:
                self._zeros |= {number for number in numbers if number is not None}
            for result, number, layout in zip(operation.results, numbers, found, strict=True):
                self.set_value(result, number, layout)

    def _note_differing(self, operation: Operation, recorded: Recorded | None, numbers: Sequence[Any]) -> None:
        """What shares the memory that is written here and not in the unsharded run, or there and not here."""
        for number in numbers:
            self._differing.pop(number, None)
        if recorded and operation.writes:
            differing = (recorded.written ^ self.written(operation)) - {None}
            self._differing.update(dict.fromkeys(differing, operation.name))

    def _ran_in_style(self, operation: Operation, backward: bool) -> bool:
        """Whether it is an operator of a style's own code whose layout only the style knows."""
        if operation.name == "index_select" and (segments := self._segments_of_table(operation)):
            layout = sharded(operation.leaves[1], segments)
            self.set_value(operation.results[0], operation.values[0].number, layout)
            return True
        if operation.name == "div" and operation.numbers == [self._ranks]:
            # a bias that each rank adds to its term of a sum, or that bias's gradient; that of an output used outside
            if operation.values[0].layout == REPLICATED:
                self.set_value(operation.results[0], operation.values[0].number, PARTIAL)
                return True
            if backward and operation.values[0].layout == PARTIAL:
                self.report("used_outside", "the gradient of an output that is used outside is a partial sum already")
        return False

    def _segments_of_table(self, operation: Operation) -> tuple[int, ...]:
        """Of a rank's rows of what every rank has, which a style takes: the segments that they are shards of."""
        table = operation.leaves[2]
        return RANK_TABLES.get(table) or () if operation.values[0].layout == REPLICATED else ()

    def _layouts(
        self, operation: Operation, recorded: Recorded | None, call_site: Any, backward: bool, zeros: bool
    ) -> list[Layout]:
        layouts = [value.layout for value in operation.values]
        count = len(operation.results)
        in_style = call_site.in_style or call_site.module in self._computed_by_style
        if UNKNOWN in layouts:
            return self._of_zeros(operation, recorded) if zeros else [UNKNOWN] * count
        if STYLE in layouts:
            known = [layout for layout in layouts if layout != STYLE]
            if not in_style and not backward:
                self.report(operation.name, "it takes an intermediate result of a style")
                return [UNKNOWN] * count
            # the gradient of a style's module meets another gradient of the same value, whose layout is known
            return known if backward and operation.name in ("add", "add_") and len(known) == 1 else [STYLE] * count
        try:
            # a recomputation that calls the module draws as its forward did, by `arrange_draws`
            if backward and not self._stack and operation.draws_for_shard(recorded.results[0] if recorded else None):
                raise UnprovenError(DRAWN_IN_BACKWARD)
            return self._judged(self._local_call(operation, recorded, backward))
        except UnprovenError as error:
            if zeros and UNKNOWN not in (found := self._of_zeros(operation, recorded)):
                return found
            if call_site.in_style or (in_style and recorded is None):
                return [STYLE] * count
            unproven = Unproven(operation.name, call_site.module, call_site.line, str(error), error.dim)
            if operation.writes or may_draw(operation.func):  # what is drawn later depends on it
                self.reports.found.append(unproven)
            else:
                self.reports.add_when_read(unproven, {self.key(result): result for result in operation.results})
            return [UNKNOWN] * count

    def _makes_zeros(self, operation: Operation, recorded: Recorded | None) -> bool:
        zeros = [value.number in self._zeros for value in operation.values]
        same = recorded is not None and recorded.plain == operation.numbers
        return (any(zeros) or same) and makes_zeros(operation.func, operation.name, operation.numbers, zeros)

    def _of_zeros(self, operation: Operation, recorded: Recorded | None) -> list[Layout]:
        wanted = recorded.results if recorded else [()] * len(operation.results)
        return [layout_of_zeros(tuple(x.shape), n, self._ranks) for x, n in zip(operation.results, wanted, strict=True)]

    def value(self, tensor: Tensor) -> NumberedValue:
        self.reports.read(self.key(tensor))
        return super().value(tensor)

    def finished(self, operation: Operation) -> None:
        """What is not proven counts where it is written somewhere or meets a DTensor; else, where its results do."""
        results = {self.key(result): result for result in operation.results}
        zeros = results and all(self.number(result).number in self._zeros for result in operation.results)
        on = all(self.number(result).layout == UNKNOWN for result in operation.results)
        writes = operation.writes
        if writes and current_autograd_node() is not None and results:  # torch's formulas write into new tensors
            writes = next(self.windows(operation.results[0]), None) is not None
        if results and on and not writes:
            self.reports.pass_on(operation.keys, results)
        elif zeros:  # whatever they are made of
            self.reports.forget(results)
        else:
            for key in operation.keys:
                self.reports.read(key)

    def _judged(self, call: LocalCall) -> list[Layout]:
        """Equal blocks ask equal questions."""
        if call not in self._answers:
            try:
                self._answers[call] = proven_layouts(call, self._mesh)
            except UnprovenError as error:
                # another one, without the frames of this, which would keep tensors alive
                self._answers[call] = UnprovenError(str(error), error.dim)
        answer = self._answers[call]
        if isinstance(answer, UnprovenError):
            raise UnprovenError(str(answer), answer.dim)
        return list(answer)

    def _local_call(self, operation: Operation, recorded: Recorded | None, backward: bool) -> LocalCall:
        layouts = tuple(value and value.layout for value in operation.inputs)
        there = recorded.leaves if recorded else tuple(
            leaf if layout is None else self._unsharded_shape(leaf, layout)
            for leaf, layout in zip(operation.shapes, layouts, strict=True)
        )  # fmt: skip
        if operator(operation.name).counts:  # on real ranks a tensor's size counts all sequences
            there = tuple(h if (h, t) == self._sequences else t for h, t in zip(operation.shapes, there, strict=True))
        node = current_autograd_node()
        return LocalCall(
            operation.func,
            operation.tree,
            operation.shapes,
            there,
            layouts,
            tuple(tuple(result.shape) for result in operation.results),
            recorded.results if recorded else None,
            self._ranks,
            frozenset(i for i, value in enumerate(operation.inputs) if value and value.number in self._zeros),
            self._first_layouts.get(forward_number(node)) if backward else None,
        )

    def _unsharded_shape(self, local: TensorShape, layout: Layout) -> TensorShape:
        """As large as the layout says: for operators of the sharded run alone."""
        if layout.kind is not Kind.SHARDED:
            return local
        shape = [n * self._ranks if d == layout.dim else n for d, n in enumerate(local.shape)]
        return shape_of(torch.empty(shape, dtype=local.dtype, device="meta"))

    def _counterpart(self, operation: Operation, key: tuple[Any, ...]) -> Recorded | None:
        """The next operator there on the same values, with equal numbers if there is one; or one that was paired before
        (a recomputation, or a product that a style makes twice)."""
        waiting = self._unsharded.operations.get(key) or []
        candidates = waiting or self._used[key]
        alike = [recorded for recorded in candidates if recorded.plain == operation.numbers]
        found = next(iter(alike or candidates), None)
        if found is None or len(found.numbers) != len(operation.results):
            return None
        if waiting:
            waiting.remove(found)
            self._used[key].append(found)
        same = [isinstance(leaf, TensorShape) for leaf in found.leaves] == [
            value is not None for value in operation.inputs
        ]
        return found if same else None

    def _ran_on_dtensors(self, operation: Operation, recorded: Recorded | None, numbers: Any) -> None:
        for i, (result, number) in enumerate(zip(operation.results, numbers, strict=True)):
            if recorded and isinstance(result, DTensor) and recorded.results[i] != tuple(result.shape):
                self.report(
                    operation.name, f"its global shape is {list(result.shape)}, unsharded {list(recorded.results[i])}"
                )
            self.set_value(result, number, self._of_dtensor(result))
        layout = self.number(operation.results[0]).layout
        if wrong := self._loss_gradients.ran(operation, numbers, self._zeros):
            self.reports.found.append(Unproven(operation.name, LOSS, "", wrong, code="CR305"))
        elif takes_all_for_none(operation, layout):
            reason = f"{operation.name} over an empty list of dims means all, and DTensor keeps shards of one"
            self.reports.found.append(Unproven(operation.name, self.module(), "", reason, code="CR413"))
        in_backward = current_autograd_node() is not None and not self._stack  # no recomputation: see `_layouts`
        for reason, dim in not_as_in_one_process(operation, layout, in_backward):
            self.report(operation.name, reason, dim=dim)

    def _of_dtensor(self, x: Tensor) -> Layout:
        return (layout_of(x.placements[0], tuple(x.shape)) or STYLE) if isinstance(x, DTensor) else REPLICATED

    def _collective(self, operation: Operation, collective: str) -> None:
        """A functional collective in a user's code: the value stays, what a rank has of it changes."""
        value = operation.values[0]
        sums = "sum" in [leaf for leaf in operation.leaves if isinstance(leaf, str)]
        layout = after_collective(collective, value.layout, sums)
        if layout is None and not self.call_site().in_style:
            self.report(operation.name, f"{collective} of what is {value.layout}")
            layout = UNKNOWN
        for result in operation.results:
            self.set_value(result, value.number, layout or STYLE)

    def _note_draw(self, operation: Operation, recorded: Recorded | None, layout: Layout) -> None:
        if current_autograd_node() is not None or not operation.draws:
            return
        flattened = False
        if self._flattened and layout == sharded(1):
            shape = recorded.results[0] if recorded else ()
            flattened = shape[1:2] == (self._flattened,)
            if flattened and len(shape) > 3:
                layout = UNKNOWN  # heads, or tokens: the other view tells
        call = self._stack[-1] if self._stack else (LOSS, 0)
        drawn_for = [leaf for leaf in recorded.leaves if isinstance(leaf, TensorShape)] if recorded else []
        order = memory_order(drawn_for[0].shape, drawn_for[0].stride) if drawn_for else None
        self.draws[call].append(Draw(layout, flattened, order))

    def _note_reads(self, operation: Operation) -> None:
        """A view of a shard may be a copy: DTensor gathers a dim of which a part is taken. What is written into it does
        not reach the tensor that it was taken from, which matters once that is read."""
        for value in operation.values:
            self.read(value.number)

    def read(self, number: Any) -> None:
        """A value is used."""
        if (writer := self._differing.pop(number, None)) is not None:
            self.report(writer, "it writes into other memory than in the unsharded model, and what it misses is read")

    def _note_writes(self, operation: Operation, found: list[Layout]) -> None:
        """What is written into a window changes the other windows on its storage, whose layout must stay true."""
        if not operation.writes or not operation.results:
            return
        target, before = operation.results[0], operation.values[0] if operation.values else None
        others = list(self.windows(target))
        self._zeros.difference_update(value.number for _, value in others)
        self._zeros.discard(before.number if before else None)
        if before is None or found[0] in (before.layout, UNKNOWN, STYLE) or not others:
            return
        for key, value in others:
            if value.layout == before.layout and value.number != before.number:
                self._values[key] = NumberedValue(value.number, UNKNOWN)
                self.report(operation.name, f"it writes what is {found[0]} into a piece of what is {value.layout}")
                return

    # -- modules and styles

    def boundary(self, key: tuple[Any, ...], tensor: Tensor) -> None:
        """Numbers that a style's code lost are found again, and values of another number are reported."""
        if key not in self._unsharded.boundaries:
            return
        number, shape = self._unsharded.boundaries[key]
        known, layout = self.value(tensor)
        name, _, side, position = key
        gradient = side.endswith("gradient")
        if key in self._gradients_from_outside:
            return  # unsharded, the same tensor gets the gradient from inside the block too
        if (name, side, position) in self._used_outside:
            self._left_blocks.add(number)
        if number in self._left_blocks and not gradient:
            self._gradients_from_outside.add((*key[:2], f"{side} gradient", position))
        if side == "input":
            self._given.setdefault(key, tensor)
            if tensor in self._in_blocks:
                self._terms.add((name, key[1], "input gradient", position))
        is_term = key in self._terms and known is not None
        if isinstance(tensor, DTensor) and tuple(tensor.shape) != shape:
            self.report(side, f"a DTensor of the global shape {list(tensor.shape)}, unsharded {list(shape)}", name)
        if layout == STYLE:
            heads = HEADS_OF_RANK.get(tensor)
            segments = self._segments.get(name, ()) if side == "output" else ()
            shown = layout_shown(tuple(tensor.shape), shape, segments, self._ranks, gradient=gradient)
            layout = sharded(*heads) if heads else shown
        elif is_term or (side, name) in self._made_by_style:
            pass
        elif known != number and (known is not None or not gradient):
            self.report(side, "it is another value than in the unsharded model", name)
            layout = UNKNOWN
        self.set_value(tensor, known if is_term else number, layout)

    def arranged(self, key: tuple[Any, ...], tensor: Tensor) -> None:
        """What a style's hook has gathered or taken its part of."""
        if self._given.pop(key, tensor) is not tensor:
            self._in_blocks[tensor] = True
        if self.value(tensor).layout == STYLE and key[0] not in self._computed_by_style:
            self.boundary(key, tensor)

    @contextmanager
    def conversions(self) -> Iterator[None]:
        """Watch where values enter and leave DTensors, and the sums of styles: values stay, layouts are declared."""

        def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def watched(ctx: Any, tensor: Any, *rest: Any) -> Any:
                if self.inside or not isinstance(tensor, Tensor):
                    return function(ctx, tensor, *rest)
                value = self.value(tensor)
                # zeros that all ranks have are terms of a sum too
                layout = UNKNOWN if value.number in self._zeros and value.layout == REPLICATED else value.layout
                self.call_site()  # the line of the gradient's way back
                self.inside += 1
                try:
                    out = function(ctx, tensor, *rest)
                finally:
                    self.inside -= 1
                first = out[0] if isinstance(out, tuple) else out
                self.set_value(first, value.number, self._converted(name, ctx, tensor, layout, first))
                return out

            return watched

        with watched_conversions(watch), watched_sums(watch):
            yield

    def _converted(self, name: str, ctx: Any, tensor: Any, layout: Layout, out: Any) -> Layout:
        if name in ("from_local", "to_local_backward"):
            return self._declared(layout, self._of_dtensor(out))
        if name == "redistribute":
            return self._of_dtensor(out)
        if name == "to_local":
            return layout if layout.kind is Kind.SHARDED else self._of_dtensor(tensor)
        if name == "from_local_backward":
            return REPLICATED if (declared := self._of_dtensor(tensor)) == PARTIAL else declared
        if name == "sum":
            self._declared(layout, PARTIAL)
            return REPLICATED if ctx.dim is None else sharded(ctx.dim)
        return REPLICATED  # the gradient of a sum over ranks, which every rank has

    def _declared(self, layout: Layout, declared: Layout) -> Layout:
        """The layout of a tensor that is declared to be something: of segments, DTensor knows only the dim."""
        if layout.kind is Kind.SHARDED and declared.kind is Kind.SHARDED and layout.dim == declared.dim:
            return layout
        if layout not in (STYLE, UNKNOWN, declared):
            self.report(
                "layout",
                f"a tensor that is {layout} is declared to be {declared}",
                dim=layout.dim if layout.dim >= 0 else None,
            )
        return declared
