"""Stage check: every kernel on this GPU against fp64, whole networks, the tests of tests/gpu, compute-sanitizer."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

import fused_resnet as fr
from benchmarks import sanitize, steps
from benchmarks.layers import DTYPES, KERNELS, Rows, kernel, key, network, offered, provides, stock
from benchmarks.models import photographs, stock_model
from benchmarks.sheet import ROOT, Job, describe
from benchmarks.ways import compiled, kind_of
from fused_resnet import backends, numerics
from fused_resnet.bench import pictures, providers, training
from fused_resnet.bench import session as sessions
from fused_resnet.bench.session import precision
from fused_resnet.judge import Judge
from fused_resnet.problem import ConvOperands, ConvProblem
from fused_resnet.testing import cases, inputs
from fused_resnet.testing.memory import guarded, poisoned

# Of one small check whose kernel is compiled; most of what cuDNN is asked for in the catalogue it refuses; the native
# library searches nothing and compiles nothing.
SECONDS = {"triton": 0.25, "cuda": 0.05, "cudnn": 0.1}
OURS = ("triton", "cuda")
TEST_SECONDS = 240
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
# What a network is checked in: of the model and of its input.
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def judge(problem: ConvProblem, operands: ConvOperands, backend: str, result: torch.Tensor) -> numerics.Bound:
    """`result` beside stock in the same precision and stock in fp64."""
    return numerics.check(result, stock(problem, operands), stock(problem, operands, exact=True), dtype=problem.dtype,
                          depth=problem.depth, folded=kernel(backend, problem).FOLDED)


def refusal(problem: ConvProblem, backend: str) -> str | None:
    """Why `backend` computes nothing for `problem`, or None."""
    if 0 in problem.output_shape:
        return "there is nothing to compute"
    if not offered(backend, problem):
        return "it has no kernel of this family"
    return kernel(backend, problem).refuse(problem)


def check_one(problem: ConvProblem, backend: str, tile: Any = None) -> Rows:
    """Right against fp64, nothing left unwritten, nothing written outside, and the same bits twice."""
    if reason := refusal(problem, backend):
        yield {"backend": backend, "status": "refused", "detail": reason}
        return
    forward = functools.partial(kernel(backend, problem).forward, **({} if tile is None else {"tile": tile}))
    with torch.no_grad(), precision(problem.dtype):
        operands = inputs.make(problem)
        with poisoned():
            first = forward(problem, operands)
        with guarded() as guards:
            fenced = operands._replace(x=guards.copy(operands.x))
            second = forward(problem, fenced)
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


def check_not_finite(problem: ConvProblem, backend: str) -> Rows:
    """NaN and Inf in the input, and in the residual, come out where they come out of stock."""
    if reason := refusal(problem, backend):
        yield {"backend": backend, "status": "refused", "detail": reason}
        return
    with torch.no_grad(), precision(problem.dtype):
        operands = inputs.make(problem)
        for tensor in filter(lambda t: t is not None, (operands.x, operands.residual)):
            for image, value in zip((0, -1, -1), NOT_FINITE, strict=True):
                tensor[image, 0 if value > 0 else -1, -1, -1 if value > 0 else 0] = value
        result, expected = kernel(backend, problem).forward(problem, operands), stock(problem, operands)
    moved = int((result.isnan() != expected.isnan()).sum())
    yield {"backend": backend, "status": "wrong" if moved else "ok",
           "detail": f"NaN in {moved} other places than stock's" if moved else ""}


def check_network(name: str, dtype: str, layout: str, backend: str | None) -> Rows:
    """A fused network against fp64, as `fused_resnet.verify` judges it."""
    with torch.no_grad(), precision(dtype), backends.use(backend):
        model = stock_model(name).to("cuda", numerics.DTYPES[dtype])
        sample = pictures.load(8).to("cuda", numerics.DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
        fused = fr.fuse(model, memory_format=LAYOUTS[layout]) if layout == "channels_last" else fr.fuse(model)
        verdict = fr.verify(model, fused, sample)
    used = sorted({row.backend for row in fr.report(fused) if row.status == "fused" and row.backend})
    yield {"backend": "+".join(used), "status": "ok" if verdict else "wrong", "rel_error": verdict.fused.rel,
           "detail": str(verdict)}


def check_step(launch: steps.Launch, backend: str = "triton") -> Rows:
    """A launch of a training step: right against fp64, nothing left unwritten, and the same bits twice."""
    family, problem = launch.family, launch.problem
    module = backends.kernels(family, problem).get(backend)
    if module is None:
        yield {"backend": backend, "status": "refused",
               "detail": dict(backends.explain(problem, family)).get(backend) or "no kernel"}
        return
    with torch.no_grad(), precision(problem.dtype):
        operands = steps.operands(launch)
        with poisoned():
            first = module.forward(problem, operands)
        second = module.forward(problem, operands)
        bounds = Judge(backends.reference(family), problem, operands, steps.depth(family, problem))(first)
    first, second = ((r,) if isinstance(r, torch.Tensor) else r for r in (first, second))
    same = all(a is b or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
    faults = [str(bound) for bound in bounds if not bound.ok] + ([] if same else ["two runs differ"])
    yield {"backend": backend, "status": "wrong" if faults else "ok", "detail": "; ".join(faults),
           "rel_error": max(bound.error.rel for bound in bounds)}


def check_gradients(name: str, batch: int, dtype: str, provider: str, device: str = "cuda") -> Rows:
    """The loss and all gradients of a fused network's first training step against fp64."""
    job = sessions.Job(name, batch, dtype, device, "training")
    work = training.Training(job, stock_model(name), photographs(max(16, batch)))
    with work.running():
        work.reference()
        step, inputs = work.build(providers.TRAINING[provider])
        bound = work.judge(step, inputs[0])
    yield {"status": "ok" if bound.ok else "wrong", "rel_error": bound.error.rel, "detail": str(bound)}


def run_tests() -> Rows:
    """pytest over tests/gpu, in a process of its own; the catalogue is left out, because this stage runs it itself."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-k", "not test_the_catalogue", "-p",
               "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS)
    except subprocess.TimeoutExpired:
        yield {"status": "failed", "detail": f"took more than {TEST_SECONDS} s"}
        return
    tail = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))][:12]
    closing = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    yield {"status": "ok" if done.returncode == 0 else "wrong", "detail": " | ".join([*tail, closing])}


def kinds(problem: ConvProblem, arch: int, backend: str = "triton") -> list[Any]:
    """Tiles of `problem`: of Triton one of each kind but the shipped one, the last; of the native library all."""
    if backend == "cuda":
        return compiled(problem, arch)
    from fused_resnet.kernels.triton import tiles

    return list({kind_of(asdict(tile)): tile for tile in tiles.candidates(problem, arch)[1:]}.values())


def on_gpu(problem: ConvProblem, dtype: str, n: int | None = None) -> Any:
    """The problem on CUDA; its images are two, where they were one, so that a tile spans images."""
    return problem._replace(device="cuda", dtype=dtype, N=n or (max(problem.N, 2) if problem.N else 0))


def layer_jobs() -> list[Job]:
    """Each shipped tile: ResNet-50's and ResNet-18's layers first, then the catalogue, the other networks."""
    sets = [("resnet50", 9.0), ("resnet18", 8.0), ("catalogue", 7.3), *((n, 4.0) for n in cases.NETWORKS)]
    seen, jobs = set(), []
    for name, value in sets:
        problems = [*cases.CATALOGUE, *cases.STEMS] if name == "catalogue" else [
            *(p for p, _ in cases.LAYERS[name]), network(name)[0][0]]
        for problem, dtype, backend in itertools.product(problems, DTYPES, KERNELS):
            problem = on_gpu(problem, dtype)
            if (problem.id, backend) in seen:
                continue
            seen.add((problem.id, backend))
            worth = value - 0.1 * DTYPES.index(dtype) - 0.25 * KERNELS.index(backend)
            jobs.append(Job(key(problem, name, f"fused_{backend}"), functools.partial(check_one, problem, backend),
                            worth, SECONDS[backend], ((problem, None),) if backend == "triton" else ()))
    return jobs


def kind_jobs(arch: int) -> list[Job]:
    """Every other kind of tile on each layer that it can run, split reductions at batch 1."""
    jobs, seen = [], set()
    for (name, value), dtype, n, backend in itertools.product((("resnet50", 7.8), ("resnext50_32x4d", 6.4)), DTYPES[:3],
                                                              (3, 1), OURS):
        for problem, _ in cases.LAYERS[name]:
            problem = on_gpu(problem, dtype, n)
            for tile in kinds(problem, arch, backend):
                if (n == 1) != (getattr(tile, "SPLIT_K", 1) > 1) or (problem, tile) in seen:
                    continue
                seen.add((problem, tile))
                jobs.append(Job(key(problem, name, f"fused_{backend}", tile=asdict(tile)),
                                functools.partial(check_one, problem, backend, tile),
                                value - 1.4 * DTYPES.index(dtype), SECONDS[backend],
                                ((problem, tile),) if backend == "triton" else ()))
    return jobs


def step_jobs() -> list[Job]:
    """The launches of training steps, forward and backward, and the gradients of whole networks."""
    jobs, seen = [], set()
    for (name, value), dtype in itertools.product((("resnet50", 7.75), ("resnet18", 6.4), ("resnext50_32x4d", 6.3)),
                                                  DTYPES):
        for launch in steps.network(name, device="cuda", dtype=dtype, N=4):
            if (what := launch._replace(count=1)) not in seen:
                seen.add(what)
                jobs += [Job(steps.key(launch, name, f"fused_{backend}"),
                             functools.partial(check_step, launch, backend), value - 1.4 * DTYPES.index(dtype),
                             SECONDS[backend]) for backend in OURS if provides(backend, launch.family)]
    for name, dtype, provider in itertools.product(("resnet50", "resnet18", "resnext50_32x4d"), ("bf16", "fp32"),
                                                   ("fused_triton", "fused")):
        job = sessions.Job(name, 16, dtype, "cuda", "training")
        jobs.append(Job({"level": "model", "problem": None, "provider": provider, "autocast": job.autocast,
                         **asdict(job)}, functools.partial(check_gradients, name, 16, dtype, provider),
                        7.6 if (name, dtype) == ("resnet50", "bf16") else 6.3, 4))
    return jobs


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines: what the tests, the networks and the sanitizer said, then everything that is wrong or failed."""
    shown = [row for row in rows if row["level"] != "layer" or row["status"] in ("wrong", "failed")]
    return [describe(row) for row in sorted(shown, key=lambda row: row["level"] == "layer")]


def jobs(arch: int) -> list[Job]:
    """The jobs of this stage."""
    rest = [Job({"level": "tests", "model": "tests/gpu"}, run_tests, 7.5, 90, patience=TEST_SECONDS + 10)]
    for tool, value in (("memcheck", 7.4), ("racecheck", 6.9), ("initcheck", 6.2), ("synccheck", 6.1)):
        rest.append(Job({"level": "tests", "model": f"compute-sanitizer {tool}"},
                        functools.partial(sanitize.run, tool), value, 50, patience=sanitize.PATIENCE))
    for i, (name, dtype, layout, backend) in enumerate(itertools.product(
            ("resnet50", "resnet18", "resnext50_32x4d"), ("bf16", "fp32"), LAYOUTS, (*OURS, None))):
        first = name == "resnet50" or backend != "cuda" and (name, dtype) != ("resnext50_32x4d", "fp32")
        rest.append(Job({"level": "model", "model": name, "problem": layout, "batch": 8, "dtype": dtype,
                         "device": "cuda", "provider": f"fused_{backend}" if backend else "fused"},
                        functools.partial(check_network, name, dtype, layout, backend),
                        (7.7 if first else 6.4) - 0.01 * i, 3))
    for problem, dtype, backend in itertools.product(cases.TINY, ("bf16", "fp32"), KERNELS):
        problem = on_gpu(problem, dtype)
        rest.append(Job(key(problem, "NaN and Inf", f"fused_{backend}"),
                        functools.partial(check_not_finite, problem, backend), 6.45, 0.2))
    return [*layer_jobs(), *kind_jobs(arch), *step_jobs(), *rest]
