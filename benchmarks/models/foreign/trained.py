"""Train models of the table for 20 steps on two real ranks under their derived plans, beside one process.

    ENVIRONMENT/bin/python -m benchmarks.models.foreign.trained GROUP KEY [KEY ...]

Prints a line of JSON for each model, precision in which it runs, and kind of styles: the largest relative difference of
a loss: cross entropy of logits of token ids, else the mean square of the output minus fixed numbers. Batches
are new in each step. Dropout modules have a probability of 0.1, and each rank draws its shard of what one process
draws; dropout is off where that is not known. In fp64 losses must agree to 1e-12, in fp32 to 1e-6.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import queue
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.models.foreign.registry import GROUPS, models_of
from colrow.dryrun.calls import Inputs, call_model, default_loss, token_ids
from colrow.dryrun.random_draws import model_draws, random_draws
from colrow.errors import PlanError
from colrow.parallel.loss import loss_context
from colrow.parallel.outputs import main_tensor
from colrow.parallel.parallelize import parallelize
from colrow.parallel.random_draws import arrange_draws
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import waited_local
from colrow.verifying.dropout import without_dropout

STEPS, TP, DROPOUT = 20, 2, 0.1
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def built(group: str, key: str, dtype: torch.dtype, dropout: float) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model, given = next(each for each in models_of(group) if each.key == key).build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model.to(dtype).train(), Inputs.of(given).map(lambda x: _cast(x, dtype))


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def runs(group: str, key: str, dtype: torch.dtype) -> bool:
    model, inputs = built(group, key, dtype, 0.0)
    try:
        call_model(model, inputs)
    except RuntimeError:  # of mixed types: a norm that computes in fp32
        return False
    return True


def loss_of(output: Any, inputs: Any) -> Tensor:
    """Positive and of a size of about one, so that relative differences mean something."""
    main, ids = main_tensor(output), token_ids(inputs)
    if ids is not None and main.dim() == 3 and ids.shape == main.shape[:2]:
        return default_loss(output, inputs)
    complete = main.full_tensor() if isinstance(main, DTensor) else main
    wanted = torch.arange(complete.numel(), dtype=complete.dtype, device=complete.device).cos().view(complete.shape)
    return (complete - wanted).square().mean()


def batch(inputs: Inputs, step: int) -> Inputs:
    """Inputs of the same shapes: floating-point ones drawn again, integers turned along their last dimension."""
    generator = torch.Generator().manual_seed(step)

    def drawn(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.is_floating_point():
            return torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device)
        return x.roll(step, dims=-1) if x.dim() > 1 else x

    return inputs.map(drawn)


def losses(model: nn.Module, inputs: Inputs, plan: Plan | None, mesh: Any, *, dropout: bool = True) -> list[float]:
    """The losses of the steps; the weights are changed. AdamW's eps is far above rounding."""
    with without_dropout(model, off=not dropout):
        return _losses(model, inputs, plan, mesh)


def _losses(model: nn.Module, inputs: Inputs, plan: Plan | None, mesh: Any) -> list[float]:
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer, found = torch.optim.AdamW(trainable, lr=1e-3, eps=1e-3, foreach=False), []
    for step in range(STEPS):
        torch.manual_seed(step)
        given = batch(inputs, step)
        optimizer.zero_grad()
        if plan is None:
            loss = loss_of(call_model(model, given), given.given)
            loss.backward()
        else:
            with loss_context(plan, mesh):
                loss = loss_of(call_model(model, given), given.given)
                loss.backward()
            align_gradients(model.parameters())
        optimizer.step()
        found.append(float(waited_local(loss.detach())))
    return found


def rank(
    number: int,
    group: str,
    key: str,
    dtypes: Sequence[torch.dtype],
    dropout: float,
    plan: str,
    store: str,
    answers: Any,
) -> None:
    """One of the ranks; rank 0 answers with the losses in each precision."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=TP)
    mesh, made = init_device_mesh("cpu", (TP,), mesh_dim_names=("tp",)), Plan.from_yaml(plan)
    for dtype in dtypes:
        model, inputs = built(group, key, dtype, dropout)
        draws = random_draws(model, made, TP, 1, 1, inputs=inputs, loss=loss_of).modules
        parallelize(model, made, mesh)
        arrange_draws(model, draws, mesh)
        found = losses(model, inputs, made, mesh, dropout=dropout > 0)
        if number == 0:
            answers.put(found)
    dist.destroy_process_group()


def compared(group: str, key: str, styles: str) -> Iterator[dict[str, Any]]:
    """A row for each precision: the worst relative difference of a loss; or one that says why there is no plan."""
    row: dict[str, Any] = {"model": key, "styles": styles}
    dtypes = [dtype for dtype in TOLERANCE if runs(group, key, dtype)]
    model, inputs = built(group, key, dtypes[0], DROPOUT)
    try:
        plan = Plan.derive(model, TP, inputs=inputs, styles=styles)  # type: ignore[arg-type]
    except PlanError as error:
        yield row | {"refused": str(error)[:200]}
        return
    has = model_draws(model, 1, 1, inputs=inputs) is not False  # by modules, or by functions with a probability
    known = not random_draws(model, plan, TP, 1, 1, inputs=inputs, loss=loss_of).unknown
    dropout = DROPOUT if has and known else 0.0
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        args = (group, key, dtypes, dropout, plan.to_yaml(), f"{folder}/store", answers)
        ranks = [context.Process(target=rank, args=(number, *args), daemon=True) for number in range(TP)]
        for process in ranks:
            process.start()
        for dtype in dtypes:
            alone = losses(*built(group, key, dtype, dropout), None, None, dropout=dropout > 0)
            try:
                split = answers.get(timeout=200)
            except queue.Empty:
                yield row | {"failed": [process.exitcode for process in ranks]}
                return
            worst = max(abs(a - b) / abs(a) for a, b in zip(alone, split, strict=True))
            says = {
                "dtype": str(dtype).removeprefix("torch."),
                "dropout": dropout,
                "first": alone[0],
                "last": alone[-1],
            }
            yield row | says | {"worst": worst, "ok": worst < TOLERANCE[dtype]}
        for process in ranks:
            process.join(60)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.foreign.trained")
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("models", nargs="+", help="as PACKAGE/NAME")
    parser.add_argument("--styles", nargs="+", default=["plain", "fast"])
    given = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    good = True
    for key in given.models:
        for styles in given.styles:
            for row in compared(given.group, key, styles):
                good &= bool(row.get("ok", "refused" in row))
                print(json.dumps(row), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
