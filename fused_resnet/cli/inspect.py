"""`fused-resnet inspect`: what fuses, what does not and why, with the launches that the profiler counts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.tree import Tree

from fused_resnet import fusing
from fused_resnet.bench import launches
from fused_resnet.bench.session import logits
from fused_resnet.cli import console, models


def inspect(
    model: Annotated[str, typer.Option(help=models.HELP)] = "resnet50",
    batch: Annotated[int, typer.Option(help="images", min=1)] = 1,
    size: Annotated[int, typer.Option(help="edge of the input in pixels", min=8)] = 224,
    channels: Annotated[int, typer.Option(help="channels of the input", min=1)] = 3,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    tree: Annotated[bool, typer.Option("--tree", help="as a tree of modules")] = False,
    out: Annotated[Path | None, typer.Option(help="write the rows to this JSON file as well")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="the counts only")] = False,
) -> None:
    """Fuses a copy, runs it under the profiler and shows every convolution: fused only if no batch-norm, add or ReLU
    operator ran for it."""
    where, precision = console.device_of(device), console.dtype_of(dtype)
    if out is not None:
        console.writable(out.parent)
    name, stock = models.resolve(model)
    stock = stock.to(where, precision)
    sample = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0)).to(where, precision)
    with console.progress(2, quiet) as show, torch.no_grad():
        show("run the stock model", 0)
        logits(stock(sample))
        before = launches.count(lambda: stock(sample), device=where)
        show("fuse and run", 1)
        fused = fusing.fuse(stock)
        for _ in range(2):  # the first run checks the kernels, the second packs what is left
            fused(sample)
        after = launches.count(lambda: fused(sample), device=where)
        labels = launches.per_label(lambda: fused(sample), device=where)
    report = fusing.report(fused)
    rows = [_row(row, labels.get(row.name)) for row in report]
    if not quiet:
        console.out.print(_tree(name, rows) if tree else _table(name, rows))
    for note in report.notes:
        console.out.print(note, markup=False, soft_wrap=True)
    seen = sum(row["status"] == "fused" for row in rows)
    console.out.print(f"stock: {launches.describe(before)}\nfused: {launches.describe(after)}\n"
                      f"{seen} of {len(rows)} convolutions fused, seen by the profiler")
    if out is not None:
        out.write_text(json.dumps({"model": name, "launches": {"stock": before, "fused": after}, "rows": rows,
                                   "notes": list(report.notes)}, indent=1) + "\n")


def _row(row: fusing.Row, seen: Counter[str] | None) -> dict[str, str]:
    """A report row with what the profiler saw; one that did not run fused says so, whatever the plan says."""
    status, reason = row.status, row.reason
    if status == "fused" and seen is None:
        status, reason = "skipped", "planned, but the stock forward ran"
    elif status == "fused" and seen is not None and not launches.ran_fused(seen):
        status, reason = "skipped", f"planned, but it launched {launches.describe(seen)}"
    return {"name": row.name, "pattern": row.pattern, "status": status, "backend": row.backend, "reason": reason,
            "launches": launches.describe(seen) if seen else ""}


def _table(name: str, rows: list[dict[str, str]]) -> Table:
    shown = Table(title=name, title_justify="left")
    for head in ("name", "pattern", "status", "backend", "launches", "reason"):
        shown.add_column(head, overflow="fold")
    for row in rows:
        shown.add_row(row["name"], row["pattern"], _coloured(row["status"]), row["backend"], row["launches"],
                      row["reason"])
    return shown


def _tree(name: str, rows: list[dict[str, str]]) -> Tree:
    root = Tree(name)
    branches = {"": root}
    for row in rows:
        path = ""
        for part in row["name"].split(".")[:-1]:
            parent, path = path, f"{path}.{part}" if path else part
            if path not in branches:
                branches[path] = branches[parent].add(part)
        text = f"{row['name'].rpartition('.')[2]}  {_coloured(row['status'])}  {row['pattern']} {row['backend']}"
        branches[path].add(f"{text.rstrip()}{'  ' + row['reason'] if row['reason'] else ''}")
    return root


def _coloured(status: str) -> str:
    return f"[green]{status}[/green]" if status == "fused" else f"[yellow]{status}[/yellow]"
