"""Kernels that measure the machine and compute nothing of use: reads from L2, launches, a barrier across the grid."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_resnet.kernels.triton.launch import launch, multiprocessors

READ_BLOCK = 4096  # elements of one read: 16 bytes for each of 8 x 32 threads, four times
READ_OPTIONS = {"num_warps": 8, "num_stages": 1}
READERS = 4  # programs on each multiprocessor: enough loads in flight
TINY_OPTIONS = {"num_warps": 1, "num_stages": 1}


@triton.jit(do_not_specialize=["BLOCKS", "PASSES"])
def read_blocks(x, sums, BLOCKS, PASSES, BLOCK: tl.constexpr):
    """sums[program] = the sum of what it read; each block is read once in each pass, by another program every time."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    acc = tl.zeros((BLOCK,), tl.int32)
    for i in range(PASSES):
        first = (pid + i * 17) % programs
        for block in range(first, BLOCKS, programs):
            # .cg: past L1, which could hold a program's share of a pass.
            acc += tl.load(x + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(sums + pid, tl.sum(acc))


@triton.jit
def touch(x, WAIT: tl.constexpr):
    """Adds one to the first element of x. WAIT: waits in the kernel for the launch before, and lets the next start."""
    if WAIT:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(x, tl.load(x) + 1)


@triton.jit(do_not_specialize=["ROUNDS"])
def meet(counter, ROUNDS):
    """ROUNDS barriers across the grid, which must be resident as a whole; `counter` starts at 0."""
    programs = tl.num_programs(0)
    for i in range(ROUNDS):
        tl.debug_barrier()
        arrived = tl.atomic_add(counter, 1, sem="acq_rel") + 1
        while arrived < (i + 1) * programs:
            arrived = tl.atomic_add(counter, 0, sem="acquire")


def bind_read(x: torch.Tensor, sums: torch.Tensor, passes: int) -> tuple[Any, int, dict[str, Any]]:
    """The launch that reads x [int32, a multiple of `READ_BLOCK` elements] `passes` times."""
    return read_blocks, sums.numel(), {"x": x, "sums": sums, "BLOCKS": x.numel() // READ_BLOCK, "PASSES": passes,
                                       "BLOCK": READ_BLOCK}


def read(x: torch.Tensor, passes: int) -> torch.Tensor:
    """Reads x [int32, a multiple of `READ_BLOCK` elements] `passes` times; returns the sums that its programs made.

    Their total is `passes` times the sum of x, whose elements must be so small that none overflows.
    """
    sums = torch.empty(READERS * multiprocessors(x.device), dtype=torch.int32, device=x.device)
    launch(*bind_read(x, sums, passes), x.device, READ_OPTIONS)
    return sums


def count(x: torch.Tensor, pdl: bool = False) -> torch.Tensor:
    """Adds one to x [1, int32] in a launch of one warp; `pdl` overlaps its start with the end of the launch before."""
    launch(touch, 1, {"x": x, "WAIT": pdl}, x.device, TINY_OPTIONS | ({"launch_pdl": True} if pdl else {}))
    return x


def barriers(counter: torch.Tensor, rounds: int) -> torch.Tensor:
    """`rounds` barriers across one program on each multiprocessor; `counter` [1, int32] goes from 0 to all arrivals."""
    launch(meet, multiprocessors(counter.device), {"counter": counter, "ROUNDS": rounds}, counter.device,
           TINY_OPTIONS | {"launch_cooperative_grid": True})
    return counter
