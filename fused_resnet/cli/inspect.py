"""`fused-resnet inspect`: what fuses, what does not and why, with the launches that the profiler counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from fused_resnet import fusing
from fused_resnet.bench import launches, results
from fused_resnet.bench.session import logits
from fused_resnet.cli import console, models, options, page
from fused_resnet.cli import tree as network


def inspect(
    model: options.Model = "resnet50",
    batch: Annotated[int, typer.Option(help="images", min=1)] = 1,
    size: Annotated[int, typer.Option(help="edge of the input in pixels", min=8)] = 224,
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
    where, precision = console.device_of(device), console.dtype_of(dtype)
    page.target(html, "--html")
    page.target(out, "--out")
    name, stock = models.resolve(model)
    stock = stock.to(where, precision)
    sample = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0)).to(where, precision)
    with console.progress(2, quiet) as show, torch.no_grad():
        show("run the stock model", 0)
        logits(_run(stock, sample, model))
        show("fuse and run", 1)
        fused = fusing.fuse(stock)
        for _ in range(2):  # the first run checks the kernels, the second packs what is left
            fused(sample)
        counts = page.counted(stock, fused, sample, where)
        labels = launches.per_label(lambda: fused(sample), device=where)
    report = fusing.report(fused)
    report = replace(report, rows=tuple(_judged(row, labels.get(row.name)) for row in report))
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
        _print(name, report, counts, seen, quiet, tree or depth is not None, depth)


def _run(stock: torch.nn.Module, sample: torch.Tensor, spec: str) -> Any:
    """The stock model's answer.

    Raises:
        ValueError: it does not take such an input.
    """
    try:
        return stock(sample)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"{spec} does not take an input of {list(sample.shape)}; --size, --channels and --batch set "
                         f"it: {error}") from error


def _judged(row: fusing.Row, seen: Counter[str] | None) -> fusing.Row:
    """A report row after what the profiler saw; one that did not run fused says so, whatever the plan says."""
    if row.status != "fused" or seen is not None and launches.ran_fused(seen):
        return row
    return replace(row, status="skipped", reason="planned, but the stock forward ran" if seen is None else
                   f"planned, but it launched {launches.describe(seen)}")


def _print(name: str, report: fusing.Report, counts: page.Counts, seen: Mapping[str, str], quiet: bool, tree: bool,
           depth: int | None) -> None:
    if not quiet:
        if tree:
            console.out.print(network.of(report, name, seen, depth))
        else:
            console.show(_table(name, report, seen), ("launches", "backend", "status"))
    for note in report.notes:
        console.out.print(note, markup=False, soft_wrap=True)
    console.out.print("\n".join(f"{which}: {launches.describe(counts[which])}" for which in ("stock", "fused")))
    console.out.print(f"{report.counted}, seen by the profiler")


def _table(name: str, report: fusing.Report, seen: Mapping[str, str]) -> Table:
    shown = Table(title=name, title_justify="left")
    widths = {"name": 14, "pattern": 13, "status": 7, "backend": 9, "launches": 8, "reason": 16}
    for head, width in widths.items():
        if head != "reason" or report.skipped():
            shown.add_column(head, overflow="fold", min_width=width)
    for row in report:
        status = Text(row.status, "green" if row.status == "fused" else "yellow")
        cells = (Text(row.name), row.pattern, status, row.ran_on, seen.get(row.name, ""), Text(row.reason))
        shown.add_row(*cells[:len(shown.columns)])
    return shown
