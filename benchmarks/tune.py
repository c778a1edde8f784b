"""Stage tune: the ground measurements, then every backend and tile on each layer, the layers that cost most first.

Timing and judging are the tuner's (`fused_resnet.tuner`); this file chooses layers, runs each tile once by itself
before it is timed, so that one that faults or hangs is known by its name, and prints what came out.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import ground, steps
from benchmarks.layers import Rows, family, key, network, operands, rated, searched
from benchmarks.sheet import Job
from benchmarks.ways import PROVIDERS, PYTORCHS, compiled, promising, proven
from fused_resnet import backends, tuner
from fused_resnet.bench.session import precision
from fused_resnet.problem import ConvProblem

MOST_TILES = 20  # of a layer: each takes seconds of one core to compile
PROVING = 0.4  # share of a layer's time after which no further tile is tried
TARGET_SHARE = 0.7  # of the roofline, that a layer should reach
# (network, batch, dtype, seconds for a layer), most valuable first.
SETS = (("resnet50", 256, "bf16", 6.0), ("resnet18", 256, "bf16", 6.0), ("resnet50", 1, "bf16", 3.0),
        ("resnext50_32x4d", 128, "bf16", 4.5), ("resnet50", 32, "bf16", 4.0), ("resnet18", 1, "bf16", 3.0),
        ("resnet50", 256, "fp16", 4.0), ("resnet50", 256, "tf32", 4.0), ("resnet18", 32, "bf16", 4.0),
        ("resnext50_32x4d", 1, "bf16", 3.0))

# The launches of a training step: (network, batch, dtype, tiles of a launch, seconds), after the first sets above.
TRAINING = (("resnet50", 256, "bf16", 6, 8.0),)
TRAINING_VALUE = 34.95


def tune_one(problem: ConvProblem, tiles: Sequence[Any], seconds: float, avoid: Sequence[dict[str, Any]] = ()) -> Rows:
    """Stock, cuDNN, `tiles` and our kernels without any in the same rounds; the fastest gets "winner".

    Each row has its share of the roofline.
    """
    end, order = time.monotonic() + seconds, [asdict(tile) for tile in tiles]
    with torch.no_grad(), precision(problem.dtype), searched():
        given, ways = operands(problem), list[tuner.Candidate]()
        known = [way for way in tuner.candidates(family(problem), problem)
                 if way.backend in PYTORCHS or way.tile is None or way.tile in order]
        for way in sorted(known, key=lambda w: order.index(w.tile) if w.tile in order else -1):
            late = time.monotonic() > end - (1 - PROVING) * seconds and any(w.tile for w in ways)
            if not late and (yield from proven(way, problem, given, avoid)):
                ways.append(way)
        left = max(0.3 * seconds, end - time.monotonic())
        rows = tuner.measure(family(problem), problem, given, left, ways=ways)
    for row in rows:
        yield {"provider": PROVIDERS.get(row["backend"], row["backend"]), "launches": None, **rated(problem, row)}


def tune_step(launch: steps.Launch, most: int, seconds: float, avoid: Sequence[dict[str, Any]] = ()) -> Rows:
    """Stock and the first `most` tiles of a training launch in the same rounds; the fastest gets "winner"."""
    end, family_, problem = time.monotonic() + seconds, launch.family, launch.problem
    with torch.no_grad(), precision(problem.dtype), searched():
        given, ways = steps.operands(launch), list[tuner.Candidate]()
        every = tuner.candidates(family_, problem)
        tiled = [way for way in every if way.tile is not None][:most]
        for way in [way for way in every if way.tile is None or way in tiled]:
            late = time.monotonic() > end - (1 - PROVING) * seconds and any(w.tile for w in ways)
            if not late and (yield from proven(way, problem, given, avoid)):
                ways.append(way)
        rows = tuner.measure(family_, problem, given, max(0.3 * seconds, end - time.monotonic()), ways=ways)
    for row in rows:
        bandwidth = launch.bytes / row["ms_p50"] / 1e6 if row.get("ms_p50") else None
        yield {"provider": PROVIDERS.get(row["backend"], row["backend"]), "launches": None, "gbytes": bandwidth, **row}


def candidates(problem: ConvProblem, arch: int) -> list[Any]:
    """The Triton tiles to measure, the shipped one first."""
    from fused_resnet.kernels.triton import stem, tiles

    return promising(problem, (stem if family(problem) == "stem" else tiles).candidates(problem, arch), MOST_TILES)


def layers(name: str, batch: int, dtype: str) -> list[tuple[ConvProblem, int]]:
    """The problems of a network on CUDA, with how often each occurs."""
    return [(p._replace(device="cuda", dtype=dtype, N=batch), count) for p, count in network(name)]


def jobs(arch: int) -> list[Job]:
    """The ground measurements, then each set's layers, the costliest first."""
    found, seen = [], set()
    for rank, (name, batch, dtype, seconds) in enumerate(SETS):
        for problem, count in layers(name, batch, dtype):
            if problem.id not in seen:
                seen.add(problem.id)
                tiles = candidates(problem, arch)
                weight = min(4.0, count * problem.flops / batch / 1e9)
                every = [*compiled(problem, arch), *tiles]
                found.append(Job(key(problem, name, graph=True), functools.partial(tune_one, problem, every, seconds),
                                 50 - 5 * rank + weight, seconds, tuple((problem, tile) for tile in tiles),
                                 patience=60 + seconds, resumable=True))
    return [*ground.jobs(arch), *found, *step_jobs()]


def step_launches() -> list[tuple[str, steps.Launch, int, float]]:
    """(network, launch, tiles, seconds) of the training steps to tune, those that move most first."""
    return [(name, launch, most, seconds) for name, batch, dtype, most, seconds in TRAINING
            for launch in sorted(steps.network(name, device="cuda", dtype=dtype, N=batch),
                                 key=lambda launch: -launch.count * launch.bytes)]


def step_jobs() -> list[Job]:
    """The launches of training steps, the costliest first."""
    launches = step_launches()
    return [Job(steps.key(launch, name, graph=True), functools.partial(tune_step, launch, most, seconds),
                TRAINING_VALUE - place / len(launches), seconds, patience=60 + seconds, resumable=True)
            for place, (name, launch, most, seconds) in enumerate(launches)]


def learn(rows: Sequence[dict[str, Any]]) -> int:
    """Puts the winners into the user's cache, where the chooser looks; returns how many there were."""
    problems = {p.id: (family(p), p) for name, batch, dtype, _ in SETS for p, _ in layers(name, batch, dtype)}
    for name, launch, _, _ in step_launches():
        problems[steps.key(launch, name)["problem"]] = launch.family, launch.problem
    winners = [row for row in rows if row.get("winner") and row.get("level") == "layer" and row["problem"] in problems]
    for row in winners:
        choice = {name: row[name] for name in ("backend", "tile", "ms_p50", "vs_stock")}
        backends.adopt(*problems[row["problem"]], choice)
    backends.reset()
    return len(winners)


def best_of(rows: Sequence[dict[str, Any]], problem: ConvProblem, provider: str | None = None) -> dict[str, Any] | None:
    """The fastest measured row of a layer, of one provider or of all."""
    found = [r for r in rows if r.get("level") == "layer" and r["problem"] == problem.id and r["status"] == "ok"
             and r.get("ms_p50") and provider in (None, r["provider"])]
    return min(found, key=lambda r: r["ms_p50"], default=None)


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines: the ground, then a table for each set that was begun, the most valuable last; "<" is below the target."""
    lines = ground.report(rows)
    for name, batch, dtype, _ in reversed(SETS):
        every = layers(name, batch, dtype)
        found = [(p, count, best_of(rows, p)) for p, count in every]
        if not any(best for _, _, best in found):
            continue
        lines.append(f"{name} {dtype} batch {batch}: ms a launch")
        for problem, count, best in found:
            if best is None:
                lines.append(f"  {problem.id:60} x{count} not measured")
                continue
            each = {name: _ms(best_of(rows, problem, provider)) for name, provider in PROVIDERS.items()}
            share = best.get("roofline_share") or 0.0
            below = "<" if share < TARGET_SHARE else " "
            lines.append(f"{below} {problem.id:60} x{count} floor {best['floor_ms']:.4f} "
                         f"best {best['ms_p50']:.4f} {share:4.0%}; cuda {each['cuda']} triton {each['triton']} "
                         f"cudnn {each['cudnn']} stock {each['reference']}; {tuner.name_of(best)}")
        lines += _totals(rows, found, batch)
    return [*lines, *_steps(rows)]


def _steps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each launch of a training step that was measured: its winner beside stock."""
    lines = []
    for name, launch, _, _ in step_launches():
        wanted = steps.key(launch, name)["problem"]
        found = [r for r in rows if r.get("problem") == wanted and r.get("ms_p50") and r.get("winner")]
        lines += [f"  {wanted:78} x{launch.count} {row['ms_p50']:.4f} ms {row['vs_stock']:.2f} x stock, "
                  f"{row['gbytes']:.0f} GB/s; {tuner.name_of(row)}" for row in found]
    return [f"training, {len(lines)} launches", *lines] if lines else []


def _ms(row: dict[str, Any] | None) -> str:
    return f"{row['ms_p50']:.4f}" if row else "none"


def _totals(rows: Sequence[dict[str, Any]], found: list, batch: int) -> list[str]:
    """What the launches of a whole network add up to, without gaps between them; nothing where a layer is missing."""
    lines = []
    for name, provider in (("best", None), ("cuda alone", "fused_cuda"), ("triton alone", "fused_triton"),
                           ("stock", "eager_channels_last")):
        times = [best_of(rows, problem, provider) for problem, _, _ in found]
        if all(times):
            total = sum(t["ms_p50"] * count for t, (_, count, _) in zip(times, found, strict=True) if t)
            lines.append(f"  all launches, {name}: {total:.3f} ms, {batch / total * 1e3:.0f} images/s")
    return lines

