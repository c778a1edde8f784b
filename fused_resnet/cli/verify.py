"""`fused-resnet verify`: the fused model's error and stock's own, both against fp64; then layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn

from fused_resnet import fusing, numerics
from fused_resnet.bench import pictures
from fused_resnet.cli import console, models, options


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


def verify(
    model: options.Model = "resnet50",
    batch: Annotated[int, typer.Option(help="images", min=1)] = 2,
    dtype: options.Dtype = "fp32",
    device: options.Device = None,
    weights: Annotated[Path | None, typer.Option(help="state dict for the model")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of pictures; default: scikit-image's")] = None,
    size: Annotated[int, typer.Option(help="edge of the input in pixels", min=8)] = pictures.SIZE,
    worst: Annotated[int, typer.Option(help="rows of the layer table", min=0)] = 10,
    as_json: options.AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="the verdict only, no progress")] = False,
) -> int:
    """Compares the fused model with stock PyTorch against an fp64 run; exit code 1 when it is out of tolerance."""
    where, precision = console.device_of(device), console.dtype_of(dtype)
    name, stock = models.resolve(model)
    photographs = pictures.load(max(8, batch), folder=images, size=size)
    if weights is not None:
        models.load_weights(stock, weights)
    else:
        pictures.calibrate(stock, photographs, say=lambda text: console.say(f"{name}: {text}", quiet))
    stock = stock.to(where, precision)
    sample = photographs[:batch].to(where, precision)
    with console.progress(3, quiet) as show, torch.no_grad():
        show("fuse and compare the outputs", 0)
        fused = fusing.fuse(stock)
        verdict = fusing.verify(stock, fused, sample)
        show("compare layer by layer", 1)
        rows = [] if quiet and not as_json or not worst else layers(stock, sample)
    report = fusing.report(fused)
    if as_json:
        console.emit({"model": name, "dtype": verdict.dtype, "device": where, "batch": batch, "ok": bool(verdict),
                      "fused": asdict(verdict.fused), "stock": asdict(verdict.stock), "verdict": str(verdict),
                      "blocks": [{**asdict(row), "ratio": row.ratio} for row in rows[:worst]],
                      "convolutions": len(report), "fused_convolutions": report.fused})
        return 0 if verdict else 1
    console.out.print(str(verdict), markup=False, soft_wrap=True)
    if rows:
        console.show(_table(rows, worst), ("class", "stock error"))
    console.out.print(report.counted)
    return 0 if verdict else 1


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


def _table(rows: list[LayerError], worst: int) -> Table:
    shown = Table(title=f"worst {min(worst, len(rows))} of {len(rows)} blocks", title_justify="left")
    shown.add_column("block", overflow="fold", min_width=8)
    shown.add_column("class")
    for head in ("fused error", "stock error", "ratio"):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in rows[:worst]:
        shown.add_row(row.name, row.kind, f"{row.fused:.2e}", f"{row.stock:.2e}", f"{row.ratio:.2f}")
    return shown
