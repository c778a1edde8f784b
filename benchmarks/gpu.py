"""All that needs a CUDA GPU: `python -m benchmarks.gpu --stage check|tune|bench --budget SECONDS --out FOLDER`.

check  every case of the catalogue x dtype x backend against fp64, with NaN-poisoned outputs, guard bands and
       bitwise repeatability; then the tests of tests/gpu. Rows of level "layer" without timings.
tune   every tile that is legal for a layer, cuDNN and stock, timed in CUDA graphs; the fastest gets "winner".
bench  whole models through the providers of `fused-resnet bench`.

One file a stage, OUT/<stage>.json. A run goes on where the last one stopped; see `benchmarks.sheet`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.sheet import ROOT, DeviceLost, Job, Sheet, describe, pending, rows_for, sources, work
from benchmarks.warm import ahead
from fused_resnet import backends, models, numerics, timing
from fused_resnet.bench import pictures, providers, results, session
from fused_resnet.bench.session import precision
from fused_resnet.bench.stock import plain
from fused_resnet.problem import ConvOperands, ConvProblem
from fused_resnet.testing import cases, inputs
from fused_resnet.testing.memory import guarded, poisoned

Rows = Iterator[dict[str, Any]]
COMMITTED = ROOT / "benchmarks" / "results" / "h200"
DTYPES = ("bf16", "fp16", "tf32", "fp32")
KERNELS = ("triton", "cudnn")
BENCH_SECONDS = 60.0  # for all providers of one model, batch and dtype
REPEATS = 10  # launches in one timed graph: replaying costs as much host time as a small layer runs


def kernel(backend: str) -> Any:
    """The module that computes conv_bn_act on `backend`."""
    return importlib.import_module(f"fused_resnet.kernels.{backend}.conv_bn_act")


def key(problem: ConvProblem, model: str, provider: str | None = None, **more: Any) -> dict[str, Any]:
    """The fields that name a layer's row."""
    named = {"provider": provider} if provider else {}
    return {"level": "layer", "model": model, "problem": problem.id, "batch": problem.N, "dtype": problem.dtype,
            "autocast": False, "device": problem.device, "mode": "inference", "graph": False, **named, **more}


def judge(problem: ConvProblem, operands: ConvOperands, backend: str, result: torch.Tensor) -> numerics.Bound:
    """`result` beside stock in the same precision and stock in fp64."""
    stock, exact = inputs.stock(problem, operands), inputs.stock(problem, operands, torch.float64)
    return numerics.check(result, stock, exact, dtype=problem.dtype, depth=problem.depth,
                          folded=kernel(backend).FOLDED)


def check_one(problem: ConvProblem, backend: str) -> Rows:
    """Right against fp64, nothing left unwritten, nothing written outside, and the same bits twice."""
    module = kernel(backend)
    reason = "there is nothing to compute" if 0 in problem.output_shape else module.refuse(problem)
    if reason:
        yield {"backend": backend, "status": "refused", "detail": reason}
        return
    with torch.no_grad(), precision(problem.dtype):
        operands = inputs.make(problem)
        with poisoned():
            first = module.forward(problem, operands)
        with guarded() as guards:
            fenced = operands._replace(x=guards.copy(operands.x))
            second = module.forward(problem, fenced)
            touched = guards.touched()
        if first is NotImplemented:
            yield {"backend": backend, "status": "refused", "detail": "declined at the launch"}
            return
        bound = judge(problem, operands, backend, first)
    faults = [] if bound.ok else [str(bound)]
    faults += [] if torch.equal(first.nan_to_num(), second.nan_to_num()) else ["two runs differ"]
    faults += [f"{touched} elements written outside of the output"] if touched else []
    yield {"backend": backend, "status": "wrong" if faults else "ok", "rel_error": bound.error.rel,
           "detail": "; ".join(faults)}


def check_jobs(arch: int) -> list[Job]:
    """ResNet-50's and ResNet-18's layers first, then the tests, the catalogue, the other networks."""
    sets = [("resnet50", 9), ("resnet18", 8), ("catalogue", 6)] + [(n, 4) for n in cases.NETWORKS]
    seen, jobs = set(), []
    for name, value in sets:
        problems = cases.CATALOGUE if name == "catalogue" else [p for p, _ in cases.LAYERS[name]]
        for problem, dtype, backend in itertools.product(problems, DTYPES, KERNELS):
            problem = problem._replace(device="cuda", dtype=dtype, N=max(problem.N, 2) if problem.N else 0)
            if (problem, backend) in seen:
                continue
            seen.add((problem, backend))
            worth = value - 0.1 * DTYPES.index(dtype) - 0.5 * KERNELS.index(backend)
            jobs.append(Job(key(problem, name, f"fused_{backend}"),
                            lambda p=problem, b=backend: check_one(p, b), worth, 5,
                            ((problem, None),) if backend == "triton" else ()))
    return [*jobs, Job({"level": "tests", "model": "tests/gpu"}, run_tests, 7, 150)]


def run_tests() -> Rows:
    """pytest over tests/gpu, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/gpu", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        yield {"status": "failed", "detail": "took more than 240 s"}
        return
    tail = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))][:5]
    closing = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    yield {"status": "ok" if done.returncode == 0 else "wrong", "detail": " | ".join([*tail, closing])}


def candidates(problem: ConvProblem, arch: int) -> list[Any]:
    """The Triton tiles to measure, the shipped one first."""
    from fused_resnet.kernels.triton import tiles

    return tiles.candidates(problem, arch)


def graphed(launch: Callable[[], torch.Tensor]) -> Callable[[object], object]:
    """`REPEATS` launches as one replayable CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            launch()
    return lambda _: graph.replay()


def tune_one(problem: ConvProblem, arch: int) -> Rows:
    """Stock, cuDNN and every tile in the same rounds; a tile that is wrong or does not compile is not timed."""
    operands = inputs.make(problem)
    ways: dict[tuple[str, str, Any], Callable[[], torch.Tensor]] = {
        ("eager_channels_last", "stock", None): lambda: inputs.stock(problem, operands)}
    if kernel("cudnn").refuse(problem) is None:
        ways["fused_cudnn", "cudnn", None] = lambda: kernel("cudnn").forward(problem, operands)
    for tile in candidates(problem, arch):
        ways["fused_triton", "triton", tile] = lambda t=tile: kernel("triton").forward(problem, operands, t)
    calls, errors, rows = {}, {}, []
    with torch.no_grad(), precision(problem.dtype):
        stock, exact = inputs.stock(problem, operands), inputs.stock(problem, operands, torch.float64)
        for way, launch in ways.items():
            try:
                bound = numerics.check(launch(), stock, exact, dtype=problem.dtype, depth=problem.depth,
                                       folded=way[1] == "cudnn")
                errors[way] = bound.error.rel
                if not bound.ok:
                    rows.append((way, {"status": "wrong", "rel_error": bound.error.rel, "detail": str(bound)}))
                    continue
                calls[way] = graphed(launch)
            except Exception as error:
                rows.append((way, {"status": "failed", "detail": f"{type(error).__name__}: {str(error)[:200]}"}))
        del stock, exact
        samples = timing.measure(calls, {way: [None, None] for way in calls}, device="cuda", budget=4.0)
    yield from layer_rows(problem, rows, samples, errors)


def layer_rows(problem: ConvProblem, faults: list, samples: dict, errors: dict) -> Rows:
    """Rows of one problem: times of one launch, the speed-up over stock, the share of the matmul peak."""
    peak = timing.matmul_peak(numerics.DTYPES[problem.dtype], "cuda")
    stock = next((times for way, times in samples.items() if way[1] == "stock"), None)
    middle = {way: timing.percentiles(times)[1] for way, times in samples.items() if way[1] != "stock"}
    best = min(middle, key=middle.__getitem__, default=None)
    for way, times in samples.items():
        low, half, high = (t / REPEATS for t in timing.percentiles(times))
        faults.append((way, {
            "status": "ok", "ms_p20": low, "ms_p50": half, "ms_p80": high, "rel_error": errors[way], "launches": None,
            "images_per_s": problem.N / half * 1e3, "vs_stock": timing.paired_ratio(stock, times) if stock else None,
            "roofline_share": problem.flops / half / 1e6 / peak, "winner": way == best}))
    for (provider, backend, tile), row in faults:
        yield {"provider": provider, "backend": backend, "tile": asdict(tile) if tile else None, **row}


def tune_jobs(arch: int) -> list[Job]:
    """The layers of ResNet-50 and ResNet-18 in bf16 at batch 256, 32 and 1, the costliest layers first."""
    jobs, seen = [], set()
    for (name, share), (n, worth) in itertools.product((("resnet50", 0), ("resnet18", -3)),
                                                       ((256, 30), (32, 20), (1, 10))):
        for problem, count in cases.LAYERS[name]:
            problem = problem._replace(device="cuda", dtype="bf16", N=n)
            if problem not in seen:
                seen.add(problem)
                weight = min(2.0, count * problem.flops / n / 1e9)
                jobs.append(Job(key(problem, name, graph=True), lambda p=problem: tune_one(p, arch),
                                worth + share + weight, 30, tuple((problem, t) for t in candidates(problem, arch))))
    return jobs


def learn(rows: list[dict[str, Any]]) -> int:
    """Puts the winners of the stage tune into the user's cache, where the chooser looks; returns how many."""
    winners = [row for row in rows if row.get("winner")]
    for row in winners:
        choice = {name: row[name] for name in ("backend", "tile", "ms_p50")}
        backends.cache().set(f"tuned conv_bn_act {row['problem']} {backends.device_name('cuda')}", choice)
    backends.reset()
    return len(winners)


def bench_jobs(arch: int) -> list[Job]:
    """Whole models, most used first: in the four dtypes, at batch 256, 32 and 1."""
    jobs = []
    for (model, a), (dtype, b), (batch, c) in itertools.product(
            (("resnet50", 6), ("resnet18", 5), ("resnext50_32x4d", 2), ("wide_resnet50_2", 1)),
            (("bf16", 3), ("fp16", 2), ("tf32", 1), ("fp32", 0)), ((256, 3), (32, 2.5), (1, 2))):
        group = session.Job(model, batch, dtype, "cuda")
        jobs.append(Job({"level": "model", "problem": None, **asdict(group)}, lambda g=group: bench_one(g),
                        a + b + c, BENCH_SECONDS + 10))
    return jobs


@functools.cache
def photographs(count: int) -> torch.Tensor:
    """The pictures that every model runs on."""
    return pictures.load(count)


@functools.cache
def network(name: str) -> torch.nn.Module:
    """The stock model with random weights, its batch norms calibrated on the pictures."""
    torch.manual_seed(0)
    return pictures.calibrate(plain(getattr(models, name)()).eval(), photographs(16))


def bench_one(job: session.Job) -> Rows:
    """Every provider of the command line on one model, batch and dtype."""
    try:
        run = session.Session({job.model: network(job.model)}, photographs(max(16, job.batch)),
                              providers.select(None, job.device), BENCH_SECONDS)
        rows = [row for group in run.run([job]) for row in group.rows]
    except Exception as error:
        rows = [results.Row("model", job.model, job.batch, job.dtype, job.device, "fused", status="failed",
                            reason=session.one_line(error))]
    for row in rows:
        if row.reason:
            print(f"{row.provider}: {row.reason}")
        yield {name: getattr(row, name) for name in results.FIELDS}


STAGES = {"check": check_jobs, "tune": tune_jobs, "bench": bench_jobs}


def summarise(sheet: Sheet, left: list[Job]) -> None:
    """A short table, then what fell short and what is missing."""
    counts = Counter((row.get("model") or "", row.get("dtype") or "", row.get("provider") or "", row["status"])
                     for row in sheet.rows)
    for name, count in sorted(counts.items()):
        print(f"{' '.join(filter(None, name[:3])):50} {name[3]:8} {count:5}")
    short = [row for row in sheet.rows if row["status"] in ("wrong", "failed")
             or (row.get("provider") == "fused" and (row.get("vs_stock") or 1) < 1)]
    for row in short[:40]:
        print("short:  ", describe(row)[:300])
    print(f"{len(sheet.rows)} rows in {sheet.path}; {len(short)} fell short; {len(left)} jobs are missing"
          + (f", the next: {dict(left[0].key)}" if left else ""))


def main(argv: list[str] | None = None) -> int:
    """Runs one stage; 0 when it is complete or the budget is used, 2 when it cannot run here."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="checks, tunes and times on a CUDA GPU")
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--budget", type=float, default=540, help="seconds")
    parser.add_argument("--out", type=Path, default=COMMITTED)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU, and PyTorch sees none on this machine", file=sys.stderr)
        return 2
    start, arch = time.monotonic(), 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    try:
        environment = {**results.describe_environment(), "sources": sources()}
        sheet = Sheet.open(args.out / f"{args.stage}.json", environment, results.commit(),
                           COMMITTED / f"{args.stage}.json")
        if args.stage == "bench":
            tuned = rows_for(args.out / "tune.json", environment) or rows_for(COMMITTED / "tune.json", environment)
            print(f"{learn(tuned)} tuned problems in use")
        jobs = pending(STAGES[args.stage](arch), sheet)
        print(f"{len(sheet.rows)} rows are there, {len(jobs)} jobs to do", flush=True)
        with ahead(pair for job in jobs for pair in job.kernels):
            left = work(jobs, sheet, args.budget - (time.monotonic() - start), alive=torch.cuda.synchronize)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except DeviceLost as error:
        rest = args.budget - (time.monotonic() - start)
        print(f"the device was lost ({error}); going on in a new process with {rest:.0f} s", flush=True)
        return subprocess.call([sys.executable, "-m", "benchmarks.gpu", "--stage", args.stage, "--budget", f"{rest}",
                                "--out", str(args.out)]) if rest > 30 else 1
    summarise(sheet, left)
    return 0


if __name__ == "__main__":
    sys.exit(main())
