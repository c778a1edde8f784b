"""Lets torchvision be imported beside a CPU build of torch.

The torchvision wheel on the package index is built for CUDA. Beside a CPU build of torch its compiled
library cannot load, and its Python part then stops at the fake kernels of two operators that were never
defined. Declaring their schemas is enough: models and transforms work, and calling the operators
themselves still raises a clear error.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch


def _loads(package: Path) -> bool:
    """Whether torchvision's compiled library fits this build of torch; loading it twice is harmless."""
    for file in package.glob("_C*.so"):
        try:
            torch.ops.load_library(file)
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")


@functools.cache
def torchvision_shim() -> object | None:
    """Declares torchvision's two missing operators; call it before `import torchvision`.

    Returns:
        What keeps the declarations alive (this function's cache holds it too), or None where they are
        not needed: with a CUDA build of torch, without torchvision, or with a torchvision that fits.
    """
    spec = None if torch.version.cuda else importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _loads(Path(spec.origin).parent):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
