"""Compiles Triton kernels ahead of the work, in processes beside it: one core would compile for an hour.

What is compiled lands in Triton's own cache on disk, where the working process finds it. Nothing is launched,
so timings are not disturbed on the device, and nothing is waited for: a kernel that is not ready is compiled in place.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from fused_resnet.problem import ConvProblem


def compile_one(problem: ConvProblem, tile: Any) -> None:
    """Compiles the kernel that `problem` launches with `tile`, or with the shipped tile for None."""
    import torch

    from fused_resnet.kernels.triton import conv_bn_act, launch, tiles
    from fused_resnet.testing import inputs

    operands = inputs.make(problem._replace(N=1))  # the batch is no part of what is compiled
    y = torch.empty_like(operands.x)
    tile = tile or tiles.pick(problem, launch.arch_of(y.device))
    kernel, programs, arguments = conv_bn_act.bind(problem, operands, y, tile)
    kernel.warmup(grid=(programs,), **arguments, **tile.options)


@contextlib.contextmanager
def ahead(tasks: Iterable[tuple[ConvProblem, Any]], workers: int | None = None) -> Iterator[None]:
    """Compiles `tasks` in order while the body runs; what is left at its end is dropped.

    Args:
        tasks: (problem, tile or None).
        workers: processes; by default all cores but two, at most 14.
    """
    workers = workers or min(14, (os.cpu_count() or 1) - 2)
    if workers < 1:
        yield
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for task in tasks:
            pool.submit(compile_one, *task)
        yield
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
