"""All that needs a CUDA GPU: `python -m benchmarks.gpu --stage check|tune|bench|ground --budget SECONDS --out FOLDER`.

check  every case of the catalogue x dtype x backend against fp64, with NaN-poisoned outputs, guard bands and bitwise
       repeatability; every kind of tile; fused networks; the tests of tests/gpu; compute-sanitizer. No timings.
tune   ground measurements, then stock, cuDNN and every tile on each layer; the fastest gets "winner".
ground the first part of tune alone: what the machine can do, and who uses it best.
bench  whole models through the providers of `fused-resnet bench`, beside the targets.

Each begins by building the native library with the tools of the machine; see `benchmarks.library`. One file a stage,
OUT/<stage>.json. A run goes on where the last one stopped; see `benchmarks.sheet`. Jobs run in a
process beside this one, which is replaced when a kernel faults or hangs; see `benchmarks.isolate`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import check, ground, library, tune, whole
from benchmarks.isolate import Worker
from benchmarks.sheet import ROOT, Job, Sheet, describe, pending, rows_for, sources, work
from benchmarks.warm import ahead
from fused_resnet.bench import results

COMMITTED = ROOT / "benchmarks" / "results" / "h200"
Report = Callable[[Sequence[dict[str, Any]]], list[str]]
STAGES: dict[str, tuple[Callable[[int], list[Job]], Report]] = {
    "check": (check.jobs, check.report), "tune": (tune.jobs, tune.report), "bench": (whole.jobs, whole.report),
    "ground": (ground.jobs, ground.report)}


def summarise(sheet: Sheet, left: Sequence[Job], report: Report) -> None:
    """A short table, what fell short, the stage's own report, which is kept beside the rows, and what is missing."""
    counts = Counter((row.get("model") or "", row.get("dtype") or "", row.get("provider") or "", row["status"])
                     for row in sheet.rows)
    for name, count in sorted(counts.items()):
        print(f"{' '.join(filter(None, name[:3])):50} {name[3]:8} {count:5}")
    short = [row for row in sheet.rows if row["status"] in ("wrong", "failed")
             or (row.get("provider") == "fused" and (row.get("vs_stock") or 1) < 1)]
    for row in short[:40]:
        print("short:  ", describe(row)[:300])
    lines = [library.describe(sheet.environment["native_build"]), *report(sheet.rows)]
    sheet.path.with_suffix(".txt").write_text("\n".join([*lines, ""]))
    print(*lines, sep="\n")
    print(f"{len(sheet.rows)} rows in {sheet.path}; {len(short)} fell short; {len(left)} jobs are missing"
          + (f", the next: {dict(left[0].key)}" if left else ""))


def run_jobs(stage: str, jobs: Callable[[int], list[Job]], budget: float, out: Path, report: Report) -> int:
    """Runs the jobs that are not done into OUT/<stage>.json; 0, or 2 where it cannot run here."""
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU, and PyTorch sees none on this machine", file=sys.stderr)
        return 2
    start = time.monotonic()
    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    try:
        built = library.build(arch, budget)
        environment = {**results.describe_environment(), "sources": sources(), "native": built["status"],
                       "native_build": built}
        sheet = Sheet.open(out / f"{stage}.json", environment, results.commit(), COMMITTED / f"{stage}.json")
        print(library.describe(built), flush=True)
        if stage == "bench":
            tuned = rows_for(out / "tune.json", environment) or rows_for(COMMITTED / "tune.json", environment)
            print(f"{tune.learn(tuned)} tuned problems in use")
        todo = pending(jobs(arch), sheet)
        print(f"{len(sheet.rows)} rows are there, {len(todo)} jobs to do", flush=True)
        with ahead((pair for job in todo for pair in job.kernels), arch), Worker() as worker:
            left = work(todo, sheet, budget - (time.monotonic() - start), run=worker.run)
            summarise(sheet, left, report)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one stage; 0 when it is complete or the budget is used, 2 when it cannot run here."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="checks, tunes and times on a CUDA GPU")
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--budget", type=float, default=540, help="seconds")
    parser.add_argument("--out", type=Path, default=COMMITTED)
    args = parser.parse_args(argv)
    jobs, report = STAGES[args.stage]
    return run_jobs(args.stage, jobs, args.budget, args.out, report)


if __name__ == "__main__":
    sys.exit(main())
