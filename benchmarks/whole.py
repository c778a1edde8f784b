"""Stage bench: whole models through the providers of `fused-resnet bench`, with the kernels that ours ran."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import targets
from benchmarks.layers import Rows, family, searched
from benchmarks.models import photographs, stock_model
from benchmarks.sheet import Job
from benchmarks.tune import layers
from fused_resnet import backends, numerics
from fused_resnet.bench import launches, pictures, providers, results, session

# (model, batch, dtype, seconds for all providers), most valuable first: those with a target, then the rest.
# The first has time for the long search of torch.compile's max-autotune, which a target is measured by.
PLAN = (("resnet50", 256, "bf16", 150.0), ("resnet50", 1, "bf16", 50.0), ("resnet18", 256, "bf16", 50.0),
        ("resnet34", 256, "bf16", 50.0), ("resnext50_32x4d", 128, "bf16", 60.0), ("resnet50", 32, "bf16", 45.0),
        ("resnet50", 256, "fp16", 45.0), ("resnet50", 256, "tf32", 45.0), ("wide_resnet50_2", 256, "bf16", 60.0),
        ("resnet18", 1, "bf16", 45.0), ("resnet50", 256, "fp32", 60.0), ("resnet18", 32, "bf16", 45.0))
PROFILED = ("fused", "fused_triton")


def profiled(job: session.Job, name: str) -> dict[str, int]:
    """The CUDA kernels that one forward of a provider of ours runs, by name."""
    dtype = numerics.DTYPES[job.dtype]
    with torch.no_grad(), session.precision(job.dtype):
        model = stock_model(job.model).to(job.device, dtype)
        batch = pictures.batches(photographs(max(16, job.batch)), job.batch, 1)[0].to(job.device, dtype)
        provider = providers.PROVIDERS[name]
        call, batch = provider.build(model, batch), provider.prepare(batch)
        call(batch)
        return dict(launches.kernel_names(lambda: call(batch)).most_common())


def bench_one(job: session.Job, seconds: float) -> Rows:
    """Every provider of the command line on one model, batch and dtype."""
    try:
        with searched():  # as in the stage tune
            run = session.Session({job.model: stock_model(job.model)}, photographs(max(16, job.batch)),
                                  providers.select(None, job.device), seconds)
            groups = list(run.run([job]))
        rows = [row for group in groups for row in group.rows]
        for group in groups:
            print("".join(f"{name} left out: {why}\n" for name, why in group.left_out.items()), end="", flush=True)
    except Exception as error:
        rows = [results.Row("model", job.model, job.batch, job.dtype, job.device, "fused", status="failed",
                            reason=session.one_line(error))]
    kernels: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.reason:
            print(f"{row.provider}: {row.reason}", flush=True)
        found: dict[str, Any] = {name: getattr(row, name) for name in results.FIELDS}
        if row.status == "ok" and row.device == "cuda" and row.provider in PROFILED:
            if row.provider not in kernels:
                kernels[row.provider] = profiled(job, row.provider)
            found["kernels"] = kernels[row.provider]
        yield found


def kernels(model: str, batch: int, dtype: str) -> tuple[tuple[Any, Any], ...]:
    """(problem, tile) of what a fused model launches in Triton: the tuned tile, else the shipped one."""
    from fused_resnet.kernels.triton.legal import Tile

    found = []
    for problem, _ in layers(model, batch, dtype):
        tile = (backends.cache().get(backends.tuned_key(family(problem), problem)) or {}).get("tile")
        found.append((problem, Tile(**tile) if tile else None))
    return tuple(found)


def jobs(arch: int) -> list[Job]:
    """Models, batches and dtypes in the order of the plan."""
    found = []
    for rank, (model, batch, dtype, seconds) in enumerate(PLAN):
        group = session.Job(model, batch, dtype, "cuda")
        found.append(Job({"level": "model", "problem": None, **asdict(group)},
                         functools.partial(bench_one, group, seconds - 10), 50 - rank, seconds,
                         kernels(model, batch, dtype), 2 * seconds))
    return found


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines: each model's rows, the kernels that ours ran, the targets."""
    lines = []
    for row in rows:
        if row.get("ms_p50"):
            share = f" {row['roofline_share']:.0%} of the matmul peak" if row.get("roofline_share") else ""
            lines.append(f"{row['model']:16} {row['dtype']} {row['batch']:4} {row['provider']:22}"
                         f"{' graph' if row['graph'] else '      '} {row['ms_p50']:9.4f} ms {row['images_per_s']:9.0f} "
                         f"images/s{share}")
    for row in rows:
        if row.get("kernels") and not row["graph"]:
            names = ", ".join(f"{count} {name[:40]}" for name, count in row["kernels"].items())
            lines.append(f"{row['model']} {row['dtype']} {row['batch']} {row['provider']} ran {names}"[:600])
    return [*lines, *targets.report(rows)]
