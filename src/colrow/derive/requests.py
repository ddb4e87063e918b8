"""What a user wants of a derived plan: modules that stay unsharded, and modules that must be split."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from colrow.derive.axes import Atom, atoms_in, forbid
from colrow.derive.infer import AxisInference
from colrow.errors import PlanError
from colrow.plans.derive_options import DeriveOptions
from colrow.plans.patterns import matching, nearest


@dataclass(frozen=True)
class Requests:
    """Parameters by name, each with the pattern of the user that names it."""

    kept: Mapping[str, str]
    split: Mapping[str, str]
    matrices: frozenset[str]
    """Parameters of two dimensions or more."""

    @classmethod
    def of(cls, model: nn.Module, options: DeriveOptions) -> Requests:
        """Raises PlanError for a pattern that names nothing, or what another one names with the opposite request."""
        kept = _named(model, "keep_whole", options.keep_whole)
        split = _named(model, "split", options.split)
        for name in kept.keys() & split.keys():
            raise PlanError(
                f"{name} is named by keep_whole ({kept[name]!r}) and by split ({split[name]!r}): leave one of them out"
            )
        return cls(kept, split, frozenset(name for name, param in model.named_parameters() if param.dim() > 1))

    def keep(self, inference: AxisInference) -> list[str]:
        """Forbid the axes of what is kept. Returns the reasons."""
        reasons: dict[str, None] = {}
        for node, name in inference.params.items():
            if (pattern := self.kept.get(name)) is not None:
                reason = f"kept unsharded, as keep_whole={pattern!r} requests"
                for dim in inference.of(node):
                    forbid(dim, reason)
                reasons[reason] = None
        return list(reasons)

    def preferred(self, inference: AxisInference) -> set[Atom]:
        """The classes of what must be split."""
        wanted = (node for node, name in inference.params.items() if name in self.split)
        return {atom for node in wanted for dim in inference.of(node) for atom in atoms_in(dim)}

    def require(self, sharded: Collection[str], replicated: Mapping[str, str], tp: int) -> None:
        """Raise PlanError for the first matrix that must be split and is not; or a pattern none of whose parameters
        is."""
        for pattern in dict.fromkeys(self.split.values()):
            names = [name for name, by in self.split.items() if by == pattern]
            missing = [name for name in names if name not in sharded]
            # a bias beside the matrix may stay, unless the pattern names nothing else
            at_fault = [name for name in missing if name in self.matrices or len(missing) == len(names)]
            if tp > 1 and at_fault:
                why = replicated[at_fault[0]]
                raise PlanError(f"split={pattern!r}: {at_fault[0]} cannot be split over tp={tp}: {why}")


def _named(model: nn.Module, option: str, patterns: Sequence[str]) -> dict[str, str]:
    """Parameters, by their first name, that the patterns name themselves or by a module that holds them."""
    first = {id(param): name for name, param in model.named_parameters()}
    names = {name: first[id(param)] for name, param in model.named_parameters(remove_duplicate=False)}
    holders = {name: list(_holders(name)) for name in names}
    found: dict[str, str] = {}
    for pattern in patterns:
        here = [names[name] for name, them in holders.items() if matching(pattern, them)]
        if not here:
            known = {holder for them in holders.values() for holder in them}
            near = nearest(pattern, known)
            hint = f": did you mean {near!r}?" if near else ""
            raise PlanError(f"{option}: {pattern!r} matches no parameter, and no module that has some{hint}")
        for name in here:
            found.setdefault(name, pattern)
    return found


def _holders(name: str) -> Iterator[str]:
    """The parameter and every module that holds it, the model itself (`""`) last."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
