"""Bytes that one rank holds in a dry run: parameters, gradients, and activations kept for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colrow.dryrun.module_tracker import ModuleTracker
from colrow.dryrun.reduced_copy import ReducedCopy
from colrow.dryrun.result import Memory
from colrow.sharding.layout import local_tensor


class SavedActivations:
    """Bytes of the distinct storages that autograd keeps for backward, without parameters.

    `pack` and `unpack` are for `torch.autograd.graph.saved_tensors_hooks`.
    """

    def __init__(self, copy: ReducedCopy, modules: ModuleTracker) -> None:
        self._copy, self._modules = copy, modules
        self._seen = {_storage(param)._cdata for param in copy.model.parameters()}
        self._alive: list[Any] = []  # an address may not be used again while it is a key
        self.nbytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)
            self.nbytes += storage.nbytes() * self._copy.count(self._modules.current())
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor


def memory_of_rank(copy: ReducedCopy, saved: SavedActivations) -> Memory:
    """Bytes after a backward pass of the copy, for all the blocks that it stands for."""
    parameters = gradients = 0
    for name, param in copy.model.named_parameters():
        local, times = local_tensor(param.detach()), copy.count(name)
        parameters += local.numel() * local.element_size() * times
        # A gradient may be larger than its parameter: a vocabulary-parallel embedding's is unsharded at first.
        grad = local if param.grad is None else local_tensor(param.grad)
        gradients += grad.numel() * grad.element_size() * times * param.requires_grad
    return Memory(parameters, gradients, saved.nbytes)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    tensor = local_tensor(tensor)
    return getattr(tensor, "elem", tensor).untyped_storage()
