"""What `fused-resnet inspect` says of a report: each row after what the profiler saw, a table or a tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from fused_resnet import fusing
from fused_resnet.bench import launches
from fused_resnet.cli import console, page
from fused_resnet.cli import tree as network


def run(stock: torch.nn.Module, sample: torch.Tensor, spec: str) -> Any:
    """The stock model's answer.

    Raises:
        ValueError: it does not take such an input.
    """
    try:
        return stock(sample)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"{spec} does not take an input of {list(sample.shape)}; --size, --channels and --batch set "
                         f"it: {error}") from error


def judged(row: fusing.Row, seen: Counter[str] | None) -> fusing.Row:
    """A report row after what the profiler saw; one that did not run fused says so, whatever the plan says."""
    if row.status != "fused" or seen is not None and launches.ran_fused(seen):
        return row
    return replace(row, status="skipped", reason="planned, but the stock forward ran" if seen is None else
                   f"planned, but it launched {launches.describe(seen)}")


def show(name: str, report: fusing.Report, counts: page.Counts, seen: Mapping[str, str], quiet: bool, tree: bool,
         depth: int | None) -> None:
    """Prints the report, as a table or a tree, and the counts."""
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
