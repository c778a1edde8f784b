"""Compiles Triton kernels ahead of the work, in processes beside it: one core would compile for an hour.

What is compiled lands in Triton's own cache on disk, where the working process finds it. Nothing is launched,
so timings are not disturbed on the device, and nothing is waited for: a kernel that is not ready is compiled in place.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

from fused_resnet.problem import ConvOperands, ConvProblem

NICE = 10  # the working process must not wait for a core


def operands(problem: ConvProblem) -> ConvOperands:
    """Operands without memory, laid out as `testing.inputs.make` lays them out."""
    import torch

    from fused_resnet.numerics import DTYPES

    p, dtype = problem, DTYPES[problem.dtype]
    vector = dtype if dtype == torch.float32 else torch.float32

    def norm(channels: int, wanted: bool) -> list[Any]:
        return [torch.empty(channels, dtype=vector, device="meta") if wanted else None for _ in range(4)]

    def image(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

    return ConvOperands(
        image(p.N, p.C, p.H, p.W), torch.empty((p.K, p.C // p.groups, p.R, p.S), dtype=dtype, device="meta"),
        torch.empty(p.K, dtype=dtype, device="meta") if p.bias else None, *norm(p.K, p.norm),
        image(p.N, p.K, p.P, p.Q) if p.residual else None, *norm(p.C, bool(p.prologue)))


def compile_one(problem: ConvProblem, tile: Any, arch: int) -> None:
    """Compiles every kernel that `problem` launches with `tile`, or with the shipped tile for None.

    The family's own forward runs with a launch that only compiles, so that its arguments are those of the real one.
    """
    from benchmarks.layers import family

    module = importlib.import_module(f"fused_resnet.kernels.triton.{family(problem)}")
    with mock.patch.multiple(module, launch=_compile, arch_of=lambda device: arch):
        module.forward(problem, operands(problem), tile)


def _compile(kernel: Any, programs: int, arguments: Mapping[str, Any], device: Any, options: Mapping[str, int]) -> None:
    kernel.warmup(grid=(programs,), **arguments, **options)


@contextlib.contextmanager
def ahead(tasks: Iterable[tuple[ConvProblem, Any]], arch: int, workers: int | None = None) -> Iterator[None]:
    """Compiles `tasks` in order while the body runs; what is left at its end is dropped.

    A worker that a compiler crashed is replaced; the kernel is met again, and reported, where it is launched.

    Args:
        tasks: (problem, tile or None).
        arch: compute capability without the dot.
        workers: processes; by default all cores but two, at most 14.
    """
    workers = workers or min(14, (os.cpu_count() or 1) - 2)
    if workers < 1:
        yield
        return
    with multiprocessing.get_context("spawn").Pool(workers, os.nice, (NICE,)) as pool:
        for task in tasks:
            pool.apply_async(compile_one, (*task, arch))
        yield
