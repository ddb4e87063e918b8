"""One virtual environment for each group of packages, with torch and transformers shared with this one."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path

import torch

PINS = Path(__file__).parent
# PyPI has torchvision for CUDA only: without CUDA its operators are missing, and its import fails where it gives them
# shapes. No model here calls them.
_OPERATORS = """import torch
_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def python_of(group: str, root: Path) -> Path:
    """The interpreter of the group's environment, which is made where it is not there or its pins have changed.

    Raises:
        subprocess.CalledProcessError: pip cannot install the pins.
    """
    folder, pins = root / group, (PINS / f"{group}.txt").read_text(encoding="utf-8")
    python, mark = folder / "bin" / "python", folder / "pins.txt"
    if mark.exists() and mark.read_text(encoding="utf-8") == pins:
        return python
    print(f"{group}: installing {len(pins.splitlines())} packages in {folder}", flush=True)
    venv.create(folder, with_pip=False, clear=True)
    # pip counts what lies there as installed, and what the environment has itself comes first
    shared, own = sysconfig.get_path("purelib"), sysconfig.get_path("purelib", vars=_base(folder))
    Path(own, "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
    requirements = root / f"{group}-constraints.txt"
    requirements.write_text(f"torch=={torch.__version__}\n", encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "-c", str(requirements)]
    subprocess.run([*install, "-r", str(PINS / f"{group}.txt")], check=True)
    for library in Path(own).glob("torchaudio/lib/*.so") if torch.version.cuda is None else ():
        library.unlink()  # built for CUDA; without the file torchaudio runs in Python alone
    for module in Path(own).glob("torchvision/_meta_registrations.py") if torch.version.cuda is None else ():
        module.write_text(_OPERATORS + module.read_text(encoding="utf-8"), encoding="utf-8")
    mark.write_text(pins, encoding="utf-8")
    return python


def _base(folder: Path) -> dict[str, str]:
    return {"base": str(folder), "platbase": str(folder)}
