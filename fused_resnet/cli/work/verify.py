"""What `fused-resnet verify` does layer by layer: the errors of every block inside the whole network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from fused_resnet import fusing, numerics


@dataclass(frozen=True)
class LayerError:
    """Relative rms errors of one module's output against fp64, inside the whole network."""

    name: str
    kind: str
    fused: float
    stock: float

    @property
    def ratio(self) -> float:
        return self.fused / max(self.stock, 1e-30)


def layers(stock: nn.Module, sample: torch.Tensor) -> list[LayerError]:
    """Errors after every module that `fuse` gives a plan of its own, worst against stock first.

    A hook inside a plan would switch it off, so each module is fused and hooked by itself, with the rest stock.
    """
    names = [name for name, module in stock.named_modules() if name and _is_block(module)]
    exact = _outputs(copy.deepcopy(stock).double(), names, sample.double())
    plain = _outputs(stock, names, sample)
    fused = _outputs(_blockwise(stock, names), names, sample)
    rows = [LayerError(name, type(stock.get_submodule(name)).__name__, numerics.measure(fused[name], exact[name]).rel,
                       numerics.measure(plain[name], exact[name]).rel) for name in exact]
    return sorted(rows, key=lambda row: row.ratio, reverse=True)


def _is_block(module: nn.Module) -> bool:
    """The smallest modules that hold a convolution together with more than containers."""
    holds = any(isinstance(child, nn.Conv2d) for child in module.children())
    return holds and not isinstance(module, nn.Sequential) and not any(_is_block(child) for child in module.children())


def _blockwise(stock: nn.Module, names: list[str]) -> nn.Module:
    """A copy in which each named module is fused for itself."""
    model = copy.deepcopy(stock)
    for name in names:
        fusing.fuse(model.get_submodule(name), inplace=True)
    return model


def _outputs(model: nn.Module, names: list[str], sample: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the named modules return for `sample`, on the CPU."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found[name] = output.detach().cpu()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        model(sample)
    finally:
        for handle in handles:
            handle.remove()
    return found


def table(rows: list[LayerError], worst: int) -> Table:
    shown = Table(title=f"worst {min(worst, len(rows))} of {len(rows)} blocks", title_justify="left")
    shown.add_column("block", overflow="fold", min_width=8)
    shown.add_column("class")
    for head in ("fused error", "stock error", "ratio"):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in rows[:worst]:
        shown.add_row(row.name, row.kind, f"{row.fused:.2e}", f"{row.stock:.2e}", f"{row.ratio:.2f}")
    return shown
