"""Stage bench: whole models through the providers of `fused-resnet bench`, with the kernels that ours ran.

Inference and training; and the largest batch that a training step fits into the memory with.
"""

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
from fused_resnet.bench import launches, pictures, providers, results, session, training

# (model, batch, dtype, seconds for all providers), most valuable first: those with a target, then the rest.
# The first has time for the long search of torch.compile's max-autotune, which a target is measured by.
PLAN = (("resnet50", 256, "bf16", 150.0), ("resnet50", 1, "bf16", 50.0), ("resnet18", 256, "bf16", 50.0),
        ("resnet34", 256, "bf16", 50.0), ("resnext50_32x4d", 128, "bf16", 60.0), ("resnet50", 32, "bf16", 45.0),
        ("resnet50", 256, "fp16", 45.0), ("resnet50", 256, "tf32", 45.0), ("wide_resnet50_2", 256, "bf16", 60.0),
        ("resnet18", 1, "bf16", 45.0), ("resnet50", 256, "fp32", 60.0), ("resnet18", 32, "bf16", 45.0))
PROFILED = ("fused", "fused_triton", "fused_cuda")
# Training, bf16 by autocast: (model, batch, dtype, seconds, value between those of the plan above, which begin at 50).
TRAINING = (("resnet50", 256, "bf16", 145.0, 45.9), ("resnet18", 256, "bf16", 90.0, 45.7))
LARGEST = (("resnet50", "eager", 45.85), ("resnet50", "fused", 45.84))
PROBES = (32, 96)  # batches whose peaks tell what one more picture takes
SPARE = 0.97  # of the memory: the allocator's blocks do not fit each other exactly
ATTEMPTS = 4


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


def predicted(peaks: Sequence[tuple[int, float]], total: float) -> int:
    """The batch that fills `SPARE` of `total` where the peak grows by the same for every picture: whole eights.

    Args:
        peaks: (batch, bytes) of two steps.
        total: bytes.
    """
    (small, low), (large, high) = peaks
    each = (high - low) / (large - small)
    return max(8, int((SPARE * total - low) / each + small) // 8 * 8)


def peak_of(provider: providers.Provider, model: str, batch: int) -> tuple[float, float]:
    """(bytes at the peak of a training step, all that is held included; milliseconds of the step), bf16 by autocast.

    Raises:
        torch.OutOfMemoryError: the step does not fit.
    """
    torch.cuda.empty_cache()
    network: Any = provider.build(stock_model(model).cuda().train(), torch.empty(0))
    step = training.Step(network, torch.bfloat16, provider.forced)
    images = provider.prepare(torch.randn(batch, 3, pictures.SIZE, pictures.SIZE, device="cuda"))
    given = images, torch.randint(1000, (batch,), device="cuda")
    step(given)  # makes the optimizer's buffers
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step(given)
    end.record()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated()), start.elapsed_time(end)


def largest_batch(model: str, name: str) -> Rows:
    """The largest batch of a training step: predicted from two small ones, confirmed by a step, else a bit less."""
    provider, total = providers.TRAINING[name], float(torch.cuda.mem_get_info()[1])
    batch = predicted([(n, peak_of(provider, model, n)[0]) for n in PROBES], total)
    for _ in range(ATTEMPTS):
        try:
            peak, ms = peak_of(provider, model, batch)
        except torch.OutOfMemoryError:
            batch = int(SPARE * batch) // 8 * 8
            continue
        yield {"batch": batch, "status": "ok", "ms_p50": ms, "images_per_s": batch / ms * 1e3,
               "peak_mem_mb": peak / 2**20}
        return
    yield {"batch": batch, "status": "failed", "detail": f"{ATTEMPTS} batches did not fit, the last {batch}"}


def bench_one(job: session.Job, seconds: float) -> Rows:
    """Every provider of the command line on one model, batch, dtype and mode."""
    try:
        with searched():  # as in the stage tune
            run = session.Session({job.model: stock_model(job.model)}, photographs(max(16, job.batch)),
                                  providers.select(None, job.device, job.mode), seconds)
            groups = list(run.run([job]))
        rows = [row for group in groups for row in group.rows]
        for group in groups:
            print("".join(f"{name} left out: {why}\n" for name, why in group.left_out.items()), end="", flush=True)
    except Exception as error:
        rows = [results.Row("model", job.model, job.batch, job.dtype, job.device, "fused", job.mode,
                            autocast=job.autocast, status="failed", reason=session.one_line(error))]
    kernels: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.reason:
            print(f"{row.provider}: {row.reason}", flush=True)
        found: dict[str, Any] = {name: getattr(row, name) for name in results.FIELDS}
        if row.status == "ok" and row.device == "cuda" and row.provider in PROFILED \
                and job.mode == "inference":
            if row.provider not in kernels:
                kernels[row.provider] = profiled(job, row.provider)
            found["kernels"] = kernels[row.provider]
        yield found


def kernels(model: str, batch: int, dtype: str) -> tuple[tuple[Any, Any], ...]:
    """(problem, tile) of what a fused model launches in Triton: the tuned tile, else the shipped one."""
    from fused_resnet.kernels.triton.legal import Tile

    found = []
    for problem, _ in layers(model, batch, dtype):
        row = backends.cache().get(backends.tuned_key(family(problem), problem)) or {}
        tile = row.get("tile") if row.get("backend") == "triton" else None
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
    for model, batch, dtype, seconds, value in TRAINING:
        group = session.Job(model, batch, dtype, "cuda", "training")
        found.append(Job({"level": "model", "problem": None, "autocast": group.autocast, **asdict(group)},
                         functools.partial(bench_one, group, seconds - 10), value, seconds, patience=2 * seconds))
    for model, name, value in LARGEST:
        found.append(Job({"level": "model", "model": model, "problem": targets.LARGEST, "dtype": "bf16",
                          "autocast": True, "device": "cuda", "mode": "training", "graph": False, "provider": name},
                         functools.partial(largest_batch, model, name), value, 12.0))
    return found


def _training(row: dict[str, Any]) -> str:
    """What a training row adds to its line."""
    if row["mode"] != "training":
        return ""
    return f" training, {row['peak_mem_mb'] or 0:.0f} MB" + (f", {row['problem']}" if row.get("problem") else "")


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines: each model's rows, the kernels that ours ran, the targets."""
    lines = []
    for row in rows:
        if row.get("ms_p50"):
            share = f" {row['roofline_share']:.0%} of the matmul peak" if row.get("roofline_share") else ""
            lines.append(f"{row['model']:16} {row['dtype']} {row['batch']:4} {row['provider']:22}"
                         f"{' graph' if row['graph'] else '      '} {row['ms_p50']:9.4f} ms {row['images_per_s']:9.0f} "
                         f"images/s{share}{_training(row)}")
    for row in rows:
        if row.get("kernels") and not row["graph"]:
            names = ", ".join(f"{count} {name[:40]}" for name, count in row["kernels"].items())
            lines.append(f"{row['model']} {row['dtype']} {row['batch']} {row['provider']} ran {names}"[:600])
    return [*lines, *targets.report(rows)]
