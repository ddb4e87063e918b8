"""The public names, as another program uses them: `import colrow` and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.forked import Commands

PROGRAM = """
import colrow
import torch
from colrow.models.llama import Llama
from colrow.models.shapes import SHAPES

with torch.device("meta"):
    model = Llama(SHAPES["laptop"])
plan = colrow.Plan.preset("llama")
assert colrow.check(model, plan, colrow.Mesh(tp=4), batch_size=2, seq_len=256) == []

import colrow.checking.check, colrow.verifying.verify, colrow.cli.check, colrow.cli.verify
from colrow import check, verify, parallelize
assert colrow.check is check and callable(colrow.check) and callable(colrow.verify)
assert "CR202" in {finding.code for finding in colrow.check(model, plan, colrow.Mesh(tp=3), seq_len=255)}
report = colrow.verify(model, plan, tp=2, backend="local")
assert report.ok and report.max_grad_rel_err < 1e-12, report
assert set(colrow.__all__) <= set(dir(colrow))
print("done")
"""


def test_the_import_does_not_wait_for_torch() -> None:
    program = "import sys, colrow; print('colrow' in sys.modules, 'torch' in sys.modules)"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr


@pytest.mark.exhaustive
def test_check_and_verify_are_functions_whatever_is_imported(commands: Commands) -> None:
    """They are packages too, `colrow.checking.check` and `colrow.verifying.verify`, which must not take the names."""
    done = subprocess.run(["python", "-c", PROGRAM], env=commands.environment(), capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
