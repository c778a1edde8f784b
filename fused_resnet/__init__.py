"""Residual CNNs with convolution, batch norm, residual add and ReLU in one launch.

Importing does no work and needs no GPU, Triton or compiler: everything below is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` finds, for type checkers and editors
    from fused_resnet import backends, functional, models, nn, numerics, testing, tuner
    from fused_resnet.fusing.apply import fuse, refresh, unfuse
    from fused_resnet.fusing.lower import lower
    from fused_resnet.fusing.quantize import quantize
    from fused_resnet.fusing.report import report
    from fused_resnet.fusing.verify import verify
    from fused_resnet.graphs import capture

__version__ = "0.1.0"
__all__ = ["__version__", "backends", "capture", "functional", "fuse", "lower", "models", "nn", "numerics", "quantize",
           "refresh", "report", "testing", "tuner", "unfuse", "verify"]

_HOMES = {"fuse": "fusing", "report": "fusing", "verify": "fusing", "unfuse": "fusing", "refresh": "fusing",
          "lower": "fusing.lower", "quantize": "fusing.quantize", "capture": "graphs"}

if not TYPE_CHECKING:  # else every name would pass
    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = _HOMES.get(name)
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name) if home else importlib.import_module(
            f"{__name__}.{name}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
