"""Heads that are a product with the embedding's weight in the code of another module: `norm(x) @ embedding.weight.T`.

No module takes the product's input, so the one that makes it, a norm, is the block: it gathers there, and its backward
sums the gradient over ranks. The weight is a rank's rows of the vocabulary for whoever reads it, and the module whose
code has the product gathers the logits that it returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from colrow.derive.infer import facts_of, op_name, shape_of
from colrow.derive.trace import is_boundary, label_of

if TYPE_CHECKING:
    from colrow.derive.blocks import BlockFinder


@dataclass(frozen=True)
class BareHead:
    """A product that makes logits.

    Attributes:
        entry: the input of the module whose output is multiplied.
        reader: the module whose code has the product; '' for the model.
        dims: of what the reader returns.
    """

    entry: Node
    reader: str
    dims: int


def bare_head(finder: BlockFinder, product: Node) -> BareHead | None:
    """The head that this product of a sharded vocabulary is; None where no plan can say how it is split: shards must be
    equal, the module before must do nothing else, and the reader must return the logits alone."""
    if not facts_of(product).contracts or any(a.size % finder.choice.tp for a in finder.choice.vocabulary):
        return None
    (made, *others) = [i for i in product.all_input_nodes if finder.flows.is_activation(i)]
    while (facts_of(made).identity or facts_of(made).moves) and not is_boundary(made) and len(made.users) == 1:
        made = made.all_input_nodes[0]  # the last position alone, for one
    reader = finder.flows.path[product]
    logits = _returned(finder, reader)  # the reader's style gathers what it returns, and nothing else
    if others or not is_boundary(made) or len(made.users) > 1 or logits is None:
        return None
    label = label_of(made)
    inputs = [b for b in finder.inputs(label.module) if b in finder.flows.live and b not in finder.flows.constant]
    splits = finder.atoms_of({*finder.interior(label.module)})
    if (label.direction, label.path) != ("out", "0") or len(finder.outputs(label.module)) > 1 or splits:
        return None
    return BareHead(inputs[0], reader, logits) if len(inputs) == 1 and "." not in label_of(inputs[0]).path else None


def no_head(finder: BlockFinder, product: Node) -> str:
    """Why the product keeps the vocabulary unsharded."""
    rows = [atom.size for atom in finder.choice.vocabulary if atom.size % finder.choice.tp]
    why = f", and tp={finder.choice.tp} does not divide their {rows[0]}" if rows else ", and no module's output"
    return f"the logits are a {op_name(product)} in {finder.flows.path[product] or 'the model'}{why}"


def _returned(finder: BlockFinder, reader: str) -> int | None:
    """How many dims the only tensor has that the reader returns, of which the last is the vocabulary; else None."""
    out = next(n for n in finder.nodes if n.op == "output")
    outputs = finder.outputs(reader) if reader else out.all_input_nodes
    if len(outputs) != 1 or not finder.flows.is_sharded(outputs[0]):
        return None
    *lead, last = finder.inference.of(outputs[0])
    return len(shape_of(outputs[0])) if finder.choice.sharded(last) and not finder.choice.any_sharded(lead) else None
