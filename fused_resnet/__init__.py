"""Residual CNNs with convolution, batch norm, residual add and ReLU in one launch.

Importing does no work and needs no GPU, Triton or compiler: everything below is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {"fuse": "fusing", "report": "fusing", "verify": "fusing", "unfuse": "fusing", "refresh": "fusing",
          "capture": "graphs",
          "functional": "", "nn": "", "models": "", "backends": "", "tuner": "", "numerics": "", "testing": ""}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name) if home else importlib.import_module(
        f"{__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
