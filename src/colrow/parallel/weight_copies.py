"""Low-precision copies of a model's parameters: which are stale, and tensors that stand in the parameters' places."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from colrow.sharding.layout import local_tensor
from colrow.torch_compat import foreach, version


class WeightCopies(ABC):
    """What the model computes with in the place of its parameters, whose tensors must be their final ones.

    The optimizer and checkpoints see the parameters alone. What they write is copied at the next `use_copies` or
    `accumulate`: stale copies are found by tensor version counters. torch's fused optimizers do not bump them: do not
    use those here. Code that writes a parameter and its copy calls `mark_current(params)`.

    Attributes:
        copies: by parameter, of its local tensor's shape.
    """

    copies: Mapping[nn.Parameter, Tensor]

    def __init__(self, model: nn.Module) -> None:
        self._owners = [
            (module, name, param)
            for module in model.modules()
            for name, param in module._parameters.items()
            if param is not None
        ]
        self._version_at_copy: dict[nn.Parameter, tuple[int, int, int]] = {}

    @contextmanager
    def use_copies(self) -> Iterator[None]:
        """Within, the model computes with copies of the current parameters."""
        self._refresh()
        self._place(self._placed())
        try:
            yield
        finally:
            self._place({})

    @abstractmethod
    def accumulate(self, micro_batches: int) -> AbstractContextManager[None]:
        """`use_copies`; afterwards `grad_holder` has the sum over the backwards within, until `drop_gradients`."""

    @abstractmethod
    def grad_holder(self, param: nn.Parameter) -> nn.Parameter:
        """The tensor whose `.grad` is the gradient of `param`."""

    def squares(self) -> dict[nn.Parameter, Tensor]:
        """For gradients whose squares were summed on the way: terms that add up to the sum over this rank's shard."""
        return {}

    def first_read(self) -> frozenset[nn.Parameter]:
        """Parameters that an update does well to write first: `start_next` then works beside the rest of it."""
        return frozenset()

    def start_next(self) -> None:
        """Called in every update, when it has written those of `first_read`."""

    def begin_micro_batch(self, *, last: bool) -> None:
        """Before each forward within `accumulate`; `last`: of the step."""

    def join(self) -> None:
        """Finish what forward and backward, or an update, have started: work that the current stream does not wait for.
        A CUDA graph must end so ([Note: state beside a graph])."""

    def hold_memory(self) -> None:
        """From now on, what outlives a micro-batch or an update keeps its address: graphs will read and write it."""

    def state(self) -> Hashable:
        """What Python knows of the step so far, where that decides which kernels a micro-batch or an update runs."""
        return ()

    def restore(self, state: Any) -> None:
        """Know what `state` said, when a graph has run the kernels that lead there."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Free the gradients that stand beside the parameters; `zero_grad` of the optimizer frees those of the
        parameters."""

    @torch.no_grad()
    def mark_current(self, params: Iterable[nn.Parameter]) -> None:
        """Declare that the copies of `params` hold the parameters' values already."""
        self._version_at_copy.update((param, _version(param)) for param in params)

    @abstractmethod
    def _placed(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """What stands in the place of each parameter."""

    def _is_stale(self, param: nn.Parameter) -> bool:
        return self._version_at_copy.get(param) != _version(param)

    @torch.no_grad()
    def _refresh(self) -> None:
        stale = [param for param in self.copies if self._is_stale(param)]
        if stale:
            copies = [self.copies[param] for param in stale]
            foreach("copy_", [local_tensor(t) for t in copies], [local_tensor(t) for t in stale])
            self.mark_current(stale)

    def _place(self, replacements: Mapping[nn.Parameter, nn.Parameter]) -> None:
        for module, name, param in self._owners:  # tied names too: each owner reads its own table
            module._parameters[name] = replacements.get(param, param)


def _version(param: nn.Parameter) -> tuple[int, int, int]:
    """Changes when an operation writes into the parameter, or when its memory is exchanged.

    Operations on a DTensor bump the DTensor's counter, operations on its local tensor that one's; fused kernels bump
    none.
    """
    local = local_tensor(param)
    return local.data_ptr(), version(local), version(param)
