"""Rules for sums of products that name their dims by letters: einsum, and the outer product."""

from __future__ import annotations

import re

from torch.fx import Node

from colrow.derive.axes import Dim, forbid, unify
from colrow.derive.infer import AxisInference, NoRuleError, Result, rule, shape_of
from colrow.derive.rules_products import forbid_own, weighted

_EQUATION = re.compile(r"(?P<operands>[A-Za-z.,]+)(?:->(?P<result>[A-Za-z.]*))?")


def letters_of(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """Each operand's dims as letters, and the result's; dims of `...` are numbers, aligned from the right."""
    match = _EQUATION.fullmatch(equation.replace(" ", ""))
    if match is None:
        raise NoRuleError("einsum of another notation")
    operands, hidden = [], 0
    for text, rank in zip(match["operands"].split(","), ranks, strict=True):
        count = rank - len(text.replace("...", ""))
        hidden = max(hidden, count)
        before, dots, after = text.partition("...")
        operands.append([*before, *(str(i) for i in range(-count, 0) if dots), *after])
    out = match["result"]
    if out is None:  # in the order of the alphabet, those that occur once
        all_letters = "".join(match["operands"].replace("...", "").split(","))
        out = "..." * ("..." in match["operands"]) + "".join(
            c for c in sorted(all_letters) if all_letters.count(c) == 1
        )
    before, dots, after = out.partition("...")
    result = [*before, *(str(i) for i in range(-hidden, 0) if dots), *after]
    if any(len(set(each)) < len(each) for each in (*operands, result)):
        raise NoRuleError("einsum with a diagonal")
    return operands, result


@rule("einsum")
def einsum(inference: AxisInference, node: Node) -> Result:
    """Dims of one letter are sharded alike. A letter that the result lacks is contracted, or summed over where one
    operand alone has it."""
    equation, tensors = node.args[:2]
    assert isinstance(tensors, (list, tuple))
    nodes = [t for t in tensors if isinstance(t, Node)]
    operands, result = letters_of(str(equation), [len(shape_of(n)) for n in nodes])
    dims: dict[str, Dim] = {}
    holders: dict[str, set[Node]] = {}
    for operand, letters in zip(nodes, operands, strict=True):
        for letter, dim, extent in zip(letters, inference.of(operand), shape_of(operand), strict=True):
            holders.setdefault(letter, set()).add(operand)
            if extent == 1:  # broadcast, or nothing to shard
                dims.setdefault(letter, [])
            elif dims.get(letter):
                unify(dims[letter], dim, inference.here)
            else:
                dims[letter] = dim
    gone = [letter for letter in dims if letter not in result]
    for letter in gone:
        if len(holders[letter]) > 1:
            weighted(inference, node, dims[letter], *holders[letter])
        else:
            forbid(dims[letter], inference.at("summed over"))
    _only_batches_of_activations(inference, nodes, operands, dims, set(gone))
    return [dims[letter] for letter in result]


def _only_batches_of_activations(
    inference: AxisInference, nodes: list[Node], operands: list[list[str]], dims: dict[str, Dim], gone: set[str]
) -> None:
    """Forbid what a matrix product of two activations forbids: where each has a dim of its own (queries and keys), only
    what both have may be sharded, and heads beside tokens. A state times a vector keeps its own dims."""
    for i, one in enumerate(nodes):
        for other, letters in zip(nodes[i + 1 :], operands[i + 1 :], strict=True):
            mine, its = set(operands[i]), set(letters)
            own = [{c for c in a - b if dims[c]} for a, b in ((mine, its), (its, mine))]
            are_activations = not inference.is_weight(one) and not inference.is_weight(other)
            if are_activations and mine & its & gone and all(own):
                for letters_of_one in own:
                    forbid_own(inference, [dims[letter] for letter in letters_of_one])


@rule("outer")
def outer(inference: AxisInference, node: Node) -> Result:
    return [inference.of(node.args[0])[0], inference.of(node.args[1])[0]]
