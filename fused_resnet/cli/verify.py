"""`fused-resnet verify`: the fused model's error and stock's own, both against fp64; then layer by layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fused_resnet.cli import options, words


def verify(
    model: options.Model = "resnet50",
    batch: Annotated[int, typer.Option(help="images", min=1)] = 2,
    dtype: options.Dtype = "fp32",
    device: options.Device = None,
    weights: Annotated[Path | None, typer.Option(help="state dict for the model")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of pictures; default: scikit-image's")] = None,
    size: options.Size = words.SIZE,
    worst: Annotated[int, typer.Option(help="rows of the layer table", min=0)] = 10,
    as_json: options.AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="the verdict only, no progress")] = False,
) -> int:
    """Compares the fused model with stock PyTorch against an fp64 run; exit code 1 when it is out of tolerance."""
    import torch

    from fused_resnet import fusing
    from fused_resnet.bench import pictures
    from fused_resnet.cli import console, models
    from fused_resnet.cli.work import verify as work

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
        rows = [] if quiet and not as_json or not worst else work.layers(stock, sample)
    report = fusing.report(fused)
    if as_json:
        console.emit({"model": name, "dtype": verdict.dtype, "device": where, "batch": batch, "ok": bool(verdict),
                      "fused": asdict(verdict.fused), "stock": asdict(verdict.stock), "verdict": str(verdict),
                      "blocks": [{**asdict(row), "ratio": row.ratio} for row in rows[:worst]],
                      "convolutions": len(report), "fused_convolutions": report.fused})
        return 0 if verdict else 1
    console.out.print(str(verdict), markup=False, soft_wrap=True)
    if rows:
        console.show(work.table(rows, worst), ("class", "stock error"))
    console.out.print(report.counted)
    return 0 if verdict else 1
