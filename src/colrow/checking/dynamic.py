"""The second layer: what a dry run shows of activations and communication.

An exception in a sharded run often comes late: the first wrong shape may be layers earlier. So the causes (declarations
that do not fit, views that split the wrong way) are searched first, and the exception is reported only when none of
them explains it.
"""

from __future__ import annotations

from collections.abc import Iterator

from colrow.checking.finding import Finding, finding
from colrow.checking.static import FUSED_FIX
from colrow.dryrun.module_tracker import LOSS
from colrow.dryrun.on_dtensors import UNMATCHED
from colrow.dryrun.recorded_calls import REDUCTIONS, RecordedCall
from colrow.dryrun.result import DryRun, Failure, Output
from colrow.errors import first_line
from colrow.plans.plan import Plan
from colrow.torch_compat import needs_values

FIX_LOG_SOFTMAX = "compute that term from logsumexp, or on gathered logits outside of the loss context"
_SHOWN = 240
"""Most characters of an error's line."""
OF_CODE = ("CR208", "CR209", "CR213", "CR413")
"""Errors in calls of the model's own code, whether their results are used or not."""


def check_dynamic(run: DryRun, plan: Plan, tp: int) -> list[Finding]:
    """Findings on activations, views, communication and the loss."""
    if run.reference_failure is not None:
        error = run.reference_failure.error
        message = (
            f"the model itself does not run on fake tensors ({type(error).__name__}: {first_line(error)[:_SHOWN]})"
        )
        return [finding("CR410", run.reference_failure.where or "model", message, _how_to_run(error))]
    found = [*_declarations(run), *_model_code(run, tp)]
    if not found:
        found = [*_shapes(run)]
    if not found and run.failure is not None:
        found = [*_log_softmax(run, plan)] or [_failure(run.failure, plan)]
    if run.failure is None:
        found += [*_loss(run, plan), *_communication(run)]
    return found


def _how_to_run(error: Exception) -> str:
    """What helps a model that does not run on fake tensors."""
    text = str(error)
    if "shape_env" in text or "Nested" in text:
        return (
            "nested tensors have sizes that depend on the data, and DTensor takes none: pad the sequences and mask "
            "them, or make and unpack the nested tensor in one module with style local_block (packed_colwise and "
            "packed_rowwise inside), which `colrow verify` proves, or whose linears the plan leaves out"
        )
    if needs_values(error):
        return (
            "its code reads a tensor's value (item(), tolist(), a branch): compute with tensors (torch.where, a mask), "
            "or rely on `colrow verify`"
        )
    return "pass example inputs, or rely on the static checks and on `colrow verify`"


def _declarations(run: DryRun) -> Iterator[Finding]:
    """Placements that are declared to DTensor in forward and do not fit the tensors."""
    for mismatch in run.mismatches:
        where = mismatch.where or "model"
        if mismatch.problem == "equal_as_shard":
            shard = f"shard({mismatch.dim})"
            message = f"its input is replicated and is declared {shard}: dim {mismatch.dim} becomes tp times longer"
            fix = f"split what comes before it ({shard}), or declare that its input is replicated"
            yield finding("CR406", where, message, fix)
        elif mismatch.backward:
            continue
        elif mismatch.problem == "varying_as_replicate":
            message = "its input differs between ranks and is declared replicate"
            fix = (
                "declare the layout it has (input: shard(1) for sequence shards), so that it is gathered; the second "
                "of two linear layers takes rowwise"
            )
            yield finding("CR407", where, message, fix)
        elif mismatch.problem == "addend_summed":
            message = "a value that is equal on all ranks is added on each of them before the sum over ranks"
            yield finding("CR409", where, message, "add it once, after the sum (style rowwise does so with its bias)")
        elif mismatch.problem in ("equal_summed", "equal_as_partial"):
            message = "a value that is equal on all ranks is summed over them: it becomes tp times too large"
            yield finding("CR409", where, message, "leave the sum out, or split what is summed")


def _model_code(run: DryRun, tp: int) -> Iterator[Finding]:
    """Reshapes, splits and reductions of the model's own code that are wrong on a shard: the first in each module."""
    for module, calls in run.calls.items():
        wanted = run.reference_calls.get(module, [])
        if len(calls) != len(wanted) and run.failure is None:
            continue  # the two runs took different branches: nothing to compare
        for got, want in zip(calls, wanted, strict=False):
            if got.op != want.op or got.on_dtensor or got.packed or len(got.source) != len(want.source):
                break
            if (wrong := _wrong_call(got, want, tp)) is not None:
                code, message, fix = wrong
                yield finding(code, module, message, fix)
                break


def _wrong_call(got: RecordedCall, want: RecordedCall, tp: int) -> tuple[str, str, str] | None:
    """Code, message and fix, when a call on a shard is not the same function as on the complete tensor."""
    if (heads := _replicated_kv_heads(got, want)) is not None:
        message = (
            f"a rank's {got.source[-3]} of {want.source[-3]} query heads meet all {heads} kv heads: attention groups "
            "them as if these were all query heads"
        )
        return "CR213", message, "give k_proj and v_proj the style kv_replicate"
    # Of a shift by a result over several dims (flattened ones too) a norm of one of them may leave nothing: CR414 then
    if got.op in REDUCTIONS and got.dim is not None and len(got.source) > 1:
        here, there = got.source[got.dim], want.source[got.dim]
        if here * tp == there:
            message = f"{got.op} over {here} of {there} values, those of one rank"
            return "CR413", message, "replicate what is before it (drop its style, or gather its output)"
    code = _view_code(got, want, tp)
    if code == "CR208":
        message = (
            f"{want.op} of {want.source} to {_shapes_text(want)} splits between fused parts; on a shard {got.source} "
            "it splits elsewhere"
        )
        return code, message, FUSED_FIX
    if code == "CR209":
        message = (
            f"{want.op} of {want.source} gives {_shapes_text(want)}; on a shard {got.source} it gives "
            f"{_shapes_text(got)}"
        )
        return code, message, "view with -1 for the number of heads and the fixed head_dim: view(B, T, -1, head_dim)"
    return None


def _replicated_kv_heads(got: RecordedCall, want: RecordedCall) -> int | None:
    """The number of kv heads, when all of them meet one rank's query heads. One kv head fits any query heads."""
    for (shape, equal), (complete, _) in zip(got.keys_and_values, want.keys_and_values, strict=False):
        if min(len(shape), len(complete), len(got.source)) < 3 or complete[-3] == 1:
            continue
        if equal and shape[-3] == complete[-3] and got.source[-3] < want.source[-3]:
            return shape[-3]
    return None


def _view_code(got: RecordedCall, want: RecordedCall, tp: int) -> str | None:
    """CR208 when a view or split cuts a sharded dim between fused parts, CR209 when it cuts heads; None when right."""
    if got.op == "scaled_dot_product_attention":
        return "CR209" if got.source[-1] != want.source[-1] else None
    sharded = [d for d, (g, w) in enumerate(zip(got.source, want.source, strict=True)) if g != w and g * tp == w]
    if len(sharded) != 1:
        return None
    if got.op in ("chunk", "split", "unbind", "tensor_split"):
        # Blocks of one size, of which a rank has fewer, are no fused parts. CR414 leaves their use open.
        blocks = len(got.result) * tp == len(want.result) and set(got.result) == set(want.result)
        return "CR208" if got.dim == sharded[0] and not blocks else None
    if len(got.result) != 1 or len(want.result) != 1 or len(got.result[0]) != len(want.result[0]):
        return None
    if sharded[0] == 0:
        # Batch merged with heads, or flattened tokens: a shard of them unflattens like all of them. A vector may be all
        # elements of a shard, and then each dim may shrink: what is right CR414 knows.
        return None
    # The sharded dim becomes several. Right: the outermost one is a shard. Wrong: it keeps its size, since the model's
    # code names it (n_heads, the number of fused parts), and another one shrinks.
    (got_shape,), (want_shape,) = got.result, want.result
    inner = [k for k in _factors(want.source, want_shape, sharded[0]) if want_shape[k] > 1]
    if len(inner) < 2 or got_shape[inner[0]] != want_shape[inner[0]]:
        return None
    return "CR209" if got_shape[inner[-1]] * tp == want_shape[inner[-1]] else "CR208"


def _factors(source: tuple[int, ...], result: tuple[int, ...], dim: int) -> list[int]:
    """The dims of `result` into which dim `dim` of `source` is split; none when it is merged with another."""
    before = 1
    for extent in source[:dim]:
        before *= extent
    end, product, found = before * source[dim], 1, []
    for k, extent in enumerate(result):
        if product >= before and product * extent <= end:
            found.append(k)
        product *= extent
        if product > end and found:
            return []
        if product == end:
            break
    return found


def _shapes_text(call: RecordedCall) -> str:
    return " and ".join(str(shape) for shape in call.result[:3])


def _shapes(run: DryRun) -> Iterator[Finding]:
    """The first module whose output is larger than, or of another number of dims than, the unsharded one's."""
    for name, wanted in run.reference_outputs.items():
        for got, want in zip(run.outputs.get(name, []), wanted, strict=False):
            if _wrong_shape(got, want):
                which = "global" if got.is_dtensor else "local"
                message = f"its output has the {which} shape {got.shape}, the unsharded model's has {want.shape}"
                yield finding(
                    "CR405", name, message, "check the input and output layouts here and in the module before"
                )
                return


def _wrong_shape(got: Output, want: Output) -> bool:
    if len(got.shape) != len(want.shape):
        return True
    if got.is_dtensor:
        return got.shape != want.shape
    return any(g > w for g, w in zip(got.shape, want.shape, strict=True))


def _failure(failure: Failure, plan: Plan) -> Finding:
    """What an exception of the sharded run means, by torch's texts."""
    text, where = first_line(failure.error)[:_SHOWN], failure.where or ("backward" if failure.backward else "model")
    if failure.where == LOSS and "mixed torch.Tensor and DTensor" in text and plan.loss == "replicated":
        message = "the logits are a DTensor, and the ordinary loss takes plain tensors"
        return finding("CR303", where, message, "set loss: vocab_parallel, or output: replicate on the head")
    phase = "backward" if failure.backward else "forward"
    if needs_values(failure.error):  # of DTensor's own code: the unsharded model ran
        message = f"the sharded {phase} needs values, which fake tensors lack ({type(failure.error).__name__}: {text})"
        return finding("CR410", where, message, "rely on the static checks and on `colrow verify`")
    if failure.where == LOSS and plan.loss != "replicated":
        message = f"the loss cannot be computed on these logits ({text})"
        fix = "use plain cross entropy on logits split over the vocabulary, or set loss: replicated and gather them"
        return finding("CR306", where, message, fix)
    if "mixed torch.Tensor and DTensor" in text:
        message = f"a plain tensor meets a DTensor ({text.partition(' need')[0].rstrip(',')})"
        fix = "give this module a style, or let the module before return local tensors (use_local_output: true)"
        return finding("CR402", where, message, fix)
    if "Attempted to flatten multiple dimensions" in text:  # torch 2.11 folds batch and sequence for a linear layer
        message = f"DTensor cannot fold a sharded sequence into the rows of a linear layer here ({text})"
        fix = (
            "gather its input, with prepare_input on the module that holds it, or give it a style with input: shard(1)"
        )
        return finding("CR404", where, message, fix)
    if isinstance(failure.error, IndexError) or "should have same length" in text:
        message = f"the style found no positional input ({text}): the module is called with keyword arguments"
        fix = (
            "with prepare_input name them with input_kwargs and desired_kwargs, with one entry in input for each "
            "positional argument; call a module of another style by position"
        )
        return finding("CR403", where, message, fix)
    if "sharding strategy registered" in text:
        message = f"DTensor has no rule for an operation here ({text})"
        return finding(
            "CR404", where, message, "let the module work on local tensors: use_local_output: true before it"
        )
    message = f"the sharded {phase} raises {type(failure.error).__name__}: {text}"
    return finding("CR401", where, message, "check the styles of this module and of those that feed it")


def _log_softmax(run: DryRun, plan: Plan) -> Iterator[Finding]:
    """What may be behind a backward that raises; where it does not, the two runs beside each other tell (CR305)."""
    if plan.loss == "vocab_parallel" and run.unmatched_log_softmaxes > 0:
        yield finding("CR305", LOSS, UNMATCHED, FIX_LOG_SOFTMAX)


def _loss(run: DryRun, plan: Plan) -> Iterator[Finding]:
    got, want = run.logits, run.reference_logits
    if got is None or want is None:
        return
    if not got.is_dtensor and got.shape[-1:] < want.shape[-1:]:
        message = (
            f"the loss runs over this rank's {got.shape[-1]} logits of {want.shape[-1]}: the head returns them as a "
            "plain tensor"
        )
        fix = (
            "set loss: vocab_parallel and a head that returns split logits (fast_head in a plan of fast styles, else "
            "colwise with use_local_output: false), or gather all logits"
        )
        yield finding("CR301", LOSS, message, fix)
    elif plan.loss == "vocab_parallel" and not got.is_dtensor:
        message = "the logits are a plain tensor, so loss: vocab_parallel saves no memory"
        yield finding("CR302", LOSS, message, "return split logits (use_local_output: false), or set loss: replicated")


def _communication(run: DryRun) -> Iterator[Finding]:
    """Data that DTensor moves implicitly, and tensors that are gathered twice."""
    for c in run.collectives:
        if c.where == LOSS or c.pass_ == "backward":
            continue
        if c.implicit and not c.cause.endswith("partial → replicate"):  # that sum is needed wherever it is made
            message = f"DTensor moves {c.bytes} bytes implicitly ({c.cause})"
            fix = "declare the change of layout: prepare_input on the module that holds these linears"
            yield finding("CR408", c.where, message, fix)
        elif c.repeated:
            message = f"the same tensor is gathered again ({c.bytes} bytes)"
            yield finding(
                "CR408", c.where, message, "gather once: prepare_input on the module that holds these linears"
            )
