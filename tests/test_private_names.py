"""No file outside torch_compat touches a private name of torch, and each path that torch_compat names exists."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

from colrow import torch_compat as tc
from test_rooms import run_time_nodes

COMPAT = Path(tc.__file__).parent
SRC = COMPAT.parent


def test_every_private_path_of_this_torch_exists() -> None:
    literals = [
        node.args[0].value
        for path in COMPAT.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "private"
        and isinstance(node.args[0], ast.Constant)
    ]
    needs_cuda = "torch._C:_cuda_getCurrentRawStream"
    assert len(literals) > 12
    for path in literals:
        if path != needs_cuda or torch.cuda.is_available():
            tc.private(path, "for this test")


PRIVATE = ("_c10d", "distributed_c10d", "_op_dispatcher", "_local_tensor", "_StridedShard", "_subclasses", "_internal",
           "f_locals", "_pytree", "_python_dispatch", "_functional_collectives", "_symmetric_memory")  # fmt: skip


def _private_uses(path: Path) -> list[str]:
    """Attributes of torch and imports from it whose name begins with an underscore; operators of aten are public."""
    found = []
    for node in run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"{path.name}:{node.lineno} {name}" for name in names if name.startswith("_")]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names if alias.name.startswith("torch") for part in alias.name.split(".")]
            found += [f"{path.name}:{node.lineno} {name}" for name in names if name.startswith("_")]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            dotted = ast.unparse(node)
            if dotted.startswith(("torch._", "torch.distributed._")) or node.attr in PRIVATE:
                found.append(f"{path.name}:{node.lineno} {dotted}")
    return found


def test_no_other_file_touches_private_names(tmp_path: Path) -> None:
    ours = [path for path in sorted(SRC.rglob("*.py")) if COMPAT not in path.parents]
    uses = [use for path in ours for use in _private_uses(path)]
    assert uses == [], "give each a wrapper in torch_compat/, and a test in tests/test_torch_compat.py"
    control = tmp_path / "control.py"
    control.write_text("import torch\nfrom torch._ops import OpOverload\nx = torch._foreach_mul_\n")
    assert len(_private_uses(control)) == 2
