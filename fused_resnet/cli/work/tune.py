"""What `fused-resnet tune` does: collects problems and operands, measures them in place, prints the winners."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import nn

from fused_resnet import backends, fusing, numerics, tuner
from fused_resnet.bench import pictures
from fused_resnet.bench.session import precision
from fused_resnet.cli import console
from fused_resnet.problem import ConvProblem

LEAST = 1.0  # seconds for a problem, however many are still to do
CALIBRATION = 4

Key = tuple[str, ConvProblem]


@dataclass
class Entry:
    """A problem, with how often the models run it and what was found."""

    family: str
    problem: ConvProblem
    count: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    detail: str = ""  # why there are no rows

    @property
    def best(self) -> dict[str, Any]:
        return next(row for row in self.rows if row["winner"])


@dataclass
class Run:
    """One model at a batch and dtype, with the problems that it meets and that no run before it meets."""

    name: str
    model: nn.Module
    sample: torch.Tensor
    dtype: str
    keys: list[Key]


def runs_of(name: str, stock: nn.Module, dtype: str, batches: list[int], shape: tuple[int, int, int], device: str,
          found: dict[Key, Entry]) -> Iterator[Run]:
    """Runs the fused model at each batch, counts its problems into `found`, and yields what meets new ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), precision(dtype):
        stock = pictures.calibrate(stock, torch.randn(CALIBRATION, *shape, generator=generator))
        fused = fusing.fuse(stock).to(device, numerics.DTYPES[dtype])
        for batch in batches:
            sample = torch.randn(batch, *shape, generator=generator).to(device, numerics.DTYPES[dtype])
            fused(sample)  # the first call runs stock, too
            with tuner.recorded() as counts:
                fused(sample)
            new = [key for key in counts if key not in found]
            for key, count in counts.items():
                found.setdefault(key, Entry(*key)).count += count
            if new:
                yield Run(f"{name} {dtype} batch {batch}", fused, sample, dtype, new)


def tuned(key: Key) -> bool:
    return backends.choose(*key).label == "tuned"


def measure(runs: list[Run], todo: dict[Key, Entry], deadline: float, quiet: bool) -> None:
    """Tunes the problems while the models run, on the operands that they have there."""
    best = ""
    with console.progress(len(todo), quiet) as show:
        for run in runs:
            waiting = {key for key in run.keys if key in todo}

            def visit(family: str, problem: ConvProblem, operands: Any, run: Run = run,
                      waiting: set[Key] = waiting) -> None:
                nonlocal best
                if (family, problem) not in waiting or time.perf_counter() > deadline:
                    return
                waiting.remove((family, problem))
                entry, left = todo[family, problem], [e for e in todo.values() if not e.rows and not e.detail]
                done, what = len(todo) - len(left), f"{run.name} {problem.id}"
                share = max(LEAST, (deadline - time.perf_counter()) / len(left))
                try:
                    entry.rows = tuner.tune(family, problem, operands, share,
                                            lambda part: show(f"{what}{best}", done + part))
                except (ValueError, RuntimeError) as error:
                    entry.detail = " ".join(str(error).split())[:200]
                gains = [e.best["vs_stock"] for e in todo.values() if e.rows]
                best = f"; best so far {max(gains):.2f} x stock" if gains else ""

            if waiting:
                with torch.no_grad(), precision(run.dtype), backends.visited(visit):
                    run.model(run.sample)


def show(device: str, todo: dict[Key, Entry], as_json: bool, quiet: bool) -> None:
    """The rows as a table or as JSON, and what is left to do."""
    done = [entry for entry in todo.values() if entry.rows]
    if as_json:
        rows = [{"family": e.family, "problem": e.problem.id, "count": e.count, **row} for e in done for row in e.rows]
        console.emit({"device": backends.device_name(device), "cache": str(backends.cache().path), "rows": rows})
    elif done:
        console.show(table(done), ("failed", "wrong", "candidates", "runs"))
    with contextlib.suppress(StopIteration):
        failed = next(entry for entry in todo.values() if entry.detail)
        console.say(f"could not be measured, among others: {failed.problem.id}: {failed.detail}")
    left = sum(not entry.rows and not entry.detail for entry in todo.values())
    console.say(f"{len(done)} problems tuned, rows in {backends.cache().path}"
                + (f"; {left} are left, start it again to go on" if left else ""), quiet)


def table(entries: list[Entry]) -> Table:
    """A line for each problem, those that take the most time of stock first."""
    shown = Table(title="fastest kernel for each problem", title_justify="left", title_style="bold")
    shown.add_column("problem", overflow="fold", min_width=20)
    shown.add_column("runs", justify="right")
    shown.add_column("winner", overflow="fold", min_width=12)
    for head in ("ms", "x stock", "candidates", "wrong", "failed"):
        shown.add_column(head, justify="right", no_wrap=True)
    for entry in sorted(entries, key=lambda e: -e.count * e.best["ms_p50"] * e.best["vs_stock"]):
        best, states = entry.best, [row["status"] for row in entry.rows]
        name = entry.problem.id if entry.family == "conv_bn_act" else f"{entry.family} {entry.problem.id}"
        shown.add_row(name, str(entry.count), tuner.name_of(best), f"{best['ms_p50']:.4g}", f"{best['vs_stock']:.2f}",
                      str(len(states)), *(str(states.count(state) or "") for state in ("wrong", "failed")),
                      style=None if best["backend"] == "reference" else "green")
    return shown
