"""The ranks that save and load together, and how they agree on what happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from colrow.errors import CheckpointError, ColrowError

T = TypeVar("T")


class Ranks:
    """A process group that can send objects from host memory; without torch.distributed, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def open(cls, group: dist.ProcessGroup | None, private: bool) -> Ranks:
        """The ranks of `group`, which sends host memory; all of them unless given. Collective.

        Without a group, a gloo one over all ranks is made where the default cannot send host memory (NCCL), or where
        `private` asks for one that nothing else uses: a background thread's collectives must not mix with the
        training loop's. torch can make a group reliably only when all ranks take part, so one over some of them is
        the caller's to make (`use_local_synchronization` names groups by how many a rank has seen).
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None)
        if group is None:
            usable = "gloo" in dist.get_backend_config() and not private
            return cls(dist.group.WORLD if usable else dist.new_group(backend="gloo"))
        if "gloo" not in dist.get_backend_config(group):
            raise CheckpointError(
                f"checkpoints were given a process group with the backend {dist.get_backend(group)}, which cannot "
                "send host memory: make it with dist.new_group(ranks, backend='gloo')"
            )
        return cls(group)

    @property
    def first(self) -> bool:
        """Whether this rank does what is done once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """`work()` on every rank; where it fails on any of them, every rank raises, so that none waits for another.

        Raises:
            CheckpointError: the user or a disk is the cause; the text has what each rank reports.
        """
        value, failure = None, None
        try:
            value = work()
        except Exception as error:
            failure = error
        reports = self.gather(None if failure is None else (as_text(failure), is_user_error(failure)))
        if failure is not None and not is_user_error(failure):
            raise failure  # a bug: its own traceback says more than the text of all ranks
        if any(reports):
            raise_of_ranks({rank: r for rank, r in enumerate(reports) if r is not None}, self.size, failure)
        return value  # type: ignore[return-value]


def is_user_error(error: BaseException) -> bool:
    """Whether a user or the machine caused it, as opposed to a bug."""
    return isinstance(error, ColrowError | OSError | MemoryError)


def as_text(error: BaseException) -> str:
    """An error's text; with its class, unless the text was written for users."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, ColrowError) else f"{type(error).__name__}: {error}"


def raise_of_ranks(reports: dict[int, tuple[str, bool]], size: int, cause: BaseException | None) -> NoReturn:
    """Raise one error for what some of `size` ranks report: (text, is_user_error). One text if all agree."""
    texts = [text for text, _ in reports.values()]
    if len(texts) == size and len(set(texts)) == 1:
        text = texts[0]
    else:
        lines = [f"rank {rank}: {text}" for rank, (text, _) in reports.items()]
        text = "\n".join(lines[:8] + ([f"and {len(lines) - 8} more ranks"] if len(lines) > 8 else []))
    if all(user_error for _, user_error in reports.values()):
        raise CheckpointError(text) from cause
    raise RuntimeError(text) from cause
