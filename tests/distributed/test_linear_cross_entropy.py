"""Vocabulary-parallel linear cross entropy equals F.cross_entropy: loss and gradients, every option, 1 to 4 ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from colrow.errors import ConfigError
from colrow.ops.linear_cross_entropy import linear_cross_entropy
from helpers.harness import Ranks
from helpers.kernel_cases import poisoned
from helpers.parity import relative

IGNORE = -100
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    layout: str = "sequence"
    """How hidden comes: `sequence` [B, t, D], `tokens` [t, D], `whole` [B, T, D], `dtensor` Shard(1), `replicate`."""
    weight: str = "dtensor"
    vocab: int = 40
    chunk: int = 4096
    smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: str = "mean"
    num_valid: int | None = None
    ignored: bool = True
    upstream: float = 1.0
    needs: tuple[str, ...] = ("hidden", "weight")
    dtype: torch.dtype = torch.float64


CASES = [
    Case(),
    Case("tokens"),
    Case("whole"),
    Case("dtensor"),
    Case("replicate"),
    Case(weight="plain"),
    Case(vocab=42),  # shards of unequal size
    Case(vocab=42, weight="plain", layout="whole"),
    Case(chunk=16),
    Case(chunk=24),  # a ragged last chunk
    Case(chunk=1),
    Case(smoothing=0.1, chunk=24),
    Case(z_loss=1e-2, chunk=24),
    Case(smoothing=0.2, z_loss=1e-2, vocab=42, chunk=24, upstream=1.7),
    Case(reduction="sum", upstream=-0.3),
    Case(num_valid=1000),
    Case(ignored=False),
    Case(needs=("hidden",)),
    Case(needs=("weight",)),
    Case("whole", needs=("weight",)),
    Case(dtype=torch.float32, chunk=24, smoothing=0.1, z_loss=1e-3),
    Case(dtype=torch.bfloat16, chunk=24),
]


def draw(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 32, 16, generator=generator, dtype=torch.float64).to(device, case.dtype)
    weight = torch.randn(case.vocab, 16, generator=generator, dtype=torch.float64).to(device, case.dtype)
    targets = torch.randint(0, case.vocab, (2, 32), generator=generator)
    if case.ignored:
        targets[0, 5:9] = targets[1, 17] = IGNORE
    return hidden, weight, targets.to(device)


def expected(case: Case, hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    hidden, weight = (x.double().clone().requires_grad_() for x in (hidden, weight))
    logits, y = (hidden @ weight.T).flatten(0, 1), targets.flatten()
    losses = F.cross_entropy(logits, y, reduction="none", ignore_index=IGNORE, label_smoothing=case.smoothing)
    losses = losses + torch.where(y != IGNORE, case.z_loss * logits.logsumexp(-1).square(), 0.0)
    divisor = {"sum": 1, "mean": case.num_valid or int((y != IGNORE).sum())}[case.reduction]
    loss = losses.sum() / divisor
    (loss * case.upstream).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


def shard_of_tokens(case: Case, x: Tensor, n: int, rank: int) -> Tensor:
    match case.layout:
        case "sequence" | "dtensor":
            return x.chunk(n, 1)[rank]
        case "tokens":
            return x.flatten(0, 1).chunk(n, 0)[rank]
    return x


def errors_of(case: Case, device: str, **changes: Any) -> dict[str, float]:
    n, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh(device, (n,), mesh_dim_names=("tp",))
    hidden, weight, targets = draw(case, device)
    want = expected(case, hidden, weight, targets)
    local_h = shard_of_tokens(case, hidden, n, rank).clone().requires_grad_("hidden" in case.needs)
    h, options = local_h, {"sequence_dim": {"sequence": 1, "tokens": 0}.get(case.layout)}
    if case.layout in ("dtensor", "replicate"):
        placement = Shard(1) if case.layout == "dtensor" else Replicate()
        h = DTensor.from_local(local_h, mesh, [placement], run_check=False)
    if case.weight == "dtensor":
        w = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_("weight" in case.needs)
    else:
        w = weight.chunk(n)[rank].clone().requires_grad_("weight" in case.needs)
        options |= {"mesh_or_group": mesh, "vocab_size": case.vocab}
    y = targets.flatten() if case.layout == "tokens" else targets
    with poisoned():
        loss = linear_cross_entropy(
            h,
            w,
            y,
            chunk=case.chunk,
            label_smoothing=case.smoothing,
            z_loss=case.z_loss,
            reduction=case.reduction,  # type: ignore[arg-type]
            num_valid=case.num_valid,
            **options,
            **changes,
        )
        (loss * case.upstream).backward()
    errors = {"loss": relative(loss.detach().double(), want["loss"])}
    if "hidden" in case.needs:
        assert local_h.grad is not None
        errors["hidden"] = relative(local_h.grad.double(), shard_of_tokens(case, want["hidden"], n, rank))
    if "weight" in case.needs:
        assert w.grad is not None
        got = w.grad.to_local() if isinstance(w.grad, DTensor) else w.grad
        errors["weight"] = relative(got.double(), want["weight"].chunk(n)[rank])
    for name, tensor in (("hidden", local_h), ("weight", w)):
        assert (tensor.grad is not None) == (name in case.needs)
    return errors


def parity_case(device: str) -> dict[Case, dict[str, float]]:
    return {case: errors_of(case, device) for case in CASES}


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_and_gradients_equal_cross_entropy(ranks: Ranks, world: int) -> None:
    for errors in ranks(world).run(parity_case):
        for case, found in errors.items():
            assert max(found.values()) < TOLERANCE[case.dtype], (case, found)


def wrong_order_case(device: str) -> float:
    """Targets of a sequence shard's tokens taken for those of a row of tokens."""
    case = Case("tokens")
    hidden, weight, targets = draw(case, device)
    n, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh(device, (n,), mesh_dim_names=("tp",))
    w = distribute_tensor(weight, mesh, [Shard(0)])
    h = hidden.chunk(n, 1)[rank].flatten(0, 1)
    loss = linear_cross_entropy(h, w, targets.flatten(), sequence_dim=0)
    return relative(loss, expected(case, hidden, weight, targets)["loss"])


@pytest.mark.distributed
def test_tokens_in_another_order_are_seen(ranks: Ranks) -> None:
    assert min(ranks(2).run(wrong_order_case)) > 1e-3


def collectives_case(device: str) -> dict[str, int]:
    """Collectives of a loss in four chunks, forward and backward."""
    from torch.profiler import ProfilerActivity, profile

    case = Case(chunk=16)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        errors_of(case, device)
    names = [event.name for event in profiler.events() if event.name.startswith("c10d::")]
    return {name: names.count(name) for name in sorted(set(names)) if "scatter_" not in name or "reduce" in name}


@pytest.mark.distributed
def test_one_small_collective_a_chunk(ranks: Ranks) -> None:
    for counts in ranks(2).run(collectives_case):
        # The hidden states once, the statistics of four chunks; the gradient once.
        assert sum(count for name, count in counts.items() if "allgather" in name) == 5, counts
        assert sum(count for name, count in counts.items() if "reduce_scatter" in name) == 1, counts
        assert not any("allreduce" in name for name in counts), counts


def refusals_case(device: str) -> list[str]:
    mesh = init_device_mesh(device, (2,), mesh_dim_names=("tp",))
    hidden, weight, targets = draw(Case(), device)
    h, w = hidden.chunk(2, 1)[dist.get_rank()], distribute_tensor(weight, mesh, [Shard(0)])
    plain = w.to_local()
    calls: list[tuple[Any, dict[str, Any]]] = [
        ((h, w, targets), {"reduction": "none", "sequence_dim": 1}),
        ((h, w, targets), {}),
        ((h, plain, targets), {"mesh_or_group": mesh, "sequence_dim": 1}),
        ((h, plain[1:], targets), {"mesh_or_group": mesh, "sequence_dim": 1, "vocab_size": 40}),
        ((h.float(), w, targets), {"sequence_dim": 1}),
        ((h, w, targets + 40), {"sequence_dim": 1}),
        ((h, distribute_tensor(weight, mesh, [Replicate()]), targets), {"sequence_dim": 1}),
        ((hidden, weight[:2], targets), {"mesh_or_group": mesh, "vocab_size": 1}),
        ((h, w, targets), {"sequence_dim": 1, "implementation": "triton"}),
    ]
    reported = []
    for args, options in calls:
        with pytest.raises(ConfigError) as error:
            linear_cross_entropy(*args, **options)
        reported.append(str(error.value))
    return reported


@pytest.mark.distributed
def test_what_does_not_fit_is_refused_with_the_fix(ranks: Ranks) -> None:
    if ranks.device == "cuda":
        pytest.skip("a GPU is not asked for the values of targets")
    wanted = ["use mean or sum", "targets must be unsharded", "give vocab_size", "torch.chunk", "cast one"]
    wanted += ["classes are 0", "Shard(0)", "use fewer ranks", "cannot be used"]
    for reported in ranks(2).run(refusals_case):
        for text, want in zip(reported, wanted, strict=True):
            assert want in text


def test_no_gradient_no_work() -> None:
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.tensor([1, 2, IGNORE])
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets).detach())


def test_nothing_to_predict_gives_zero() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((3,), IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_tied_weight_gets_both_gradients() -> None:
    torch.manual_seed(0)
    table = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    ids, targets = torch.randint(0, 11, (2, 6)), torch.randint(0, 11, (2, 6))
    gradients = []
    for loss in (
        F.cross_entropy((F.embedding(ids, table).tanh() @ table.T).flatten(0, 1), targets.flatten()),
        linear_cross_entropy(F.embedding(ids, table).tanh(), table, targets, chunk=5),
    ):
        gradients.append(torch.autograd.grad(loss, table)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
