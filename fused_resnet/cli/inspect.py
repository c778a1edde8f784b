"""`fused-resnet inspect`: what fuses, what does not and why, with the launches that the profiler counts."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from fused_resnet.cli import options, words


def inspect(
    model: options.Model = "resnet50",
    batch: Annotated[int, typer.Option(help="images", min=1)] = 1,
    size: options.Size = words.SIZE,
    channels: Annotated[int, typer.Option(help="channels of the input", min=1)] = 3,
    dtype: options.Dtype = "fp32",
    device: options.Device = None,
    tree: Annotated[bool, typer.Option("--tree", help="as a tree of modules; equal neighbours in one line")] = False,
    depth: Annotated[int | None, typer.Option(help="levels of the tree that are spelled out; implies --tree",
                                              min=0)] = None,
    html: Annotated[Path | None, typer.Option(help="write the report to this file as a page, as well")] = None,
    out: Annotated[Path | None, typer.Option(help="write what --json prints to this file, as well")] = None,
    as_json: options.AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="the counts only, no progress")] = False,
) -> None:
    """Fuses a copy, runs it under the profiler and shows every convolution: fused only if no batch-norm, add or ReLU
    operator ran for it."""
    import torch

    from fused_resnet import fusing
    from fused_resnet.bench import launches, results
    from fused_resnet.bench.session import logits
    from fused_resnet.cli import console, models, page
    from fused_resnet.cli.work import inspect as work

    where, precision = console.device_of(device), console.dtype_of(dtype)
    page.target(html, "--html")
    page.target(out, "--out")
    name, stock = models.resolve(model)
    stock = stock.to(where, precision)
    sample = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0)).to(where, precision)
    with console.progress(2, quiet) as show, torch.no_grad():
        show("run the stock model", 0)
        logits(work.run(stock, sample, model))
        show("fuse and run", 1)
        fused = fusing.fuse(stock)
        for _ in range(2):  # the first run checks the kernels, the second packs what is left
            fused(sample)
        counts = page.counted(stock, fused, sample, where)
        labels = launches.per_label(lambda: fused(sample), device=where)
    report = fusing.report(fused)
    report = replace(report, rows=tuple(work.judged(row, labels.get(row.name)) for row in report))
    seen = {name: launches.describe(counted) for name, counted in labels.items()}
    record = {"model": name, "launches": counts, "rows": [{**asdict(row), "launches": seen.get(row.name, "")}
                                                          for row in report], "notes": list(report.notes)}
    if out is not None:
        out.write_text(results.to_text(record) + "\n")
    if html is not None:
        page.write(html, name, report, counts)
    if as_json:
        console.emit(record)
    else:
        work.show(name, report, counts, seen, quiet, tree or depth is not None, depth)
