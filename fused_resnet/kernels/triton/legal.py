"""What a tile is, and the one judgement of where it can run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fused_resnet.problem import ELEMENT_BYTES, ConvProblem

# Dynamic shared memory that one program may hold, per class of architectures.
SHARED_LIMIT = {80: 166912, 86: 101376, 90: 232448}
# Kernels that reach memory through tensor descriptors.
TMA = ("gemm1x1", "box")
# The same in Gluon, with warps that specialise.
WS = "ws"
# Coordinates of tensor descriptors have 32 bits, and the last block reaches beyond the tensor.
LARGEST_COORDINATE = 2**31 - 1024


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    BLOCK_M output pixels x BLOCK_N output channels, reduced BLOCK_K elements at a time. SWAP makes the
    channels the rows of the matrix product. SPLIT_K programs share the reduction of one tile.

    kernel: "gemm"; "grouped", the same with several groups in one product; "depthwise" (BLOCK_K unused);
    "gemm1x1" and "box", which load through tensor descriptors (Hopper); "ws", where num_warps warps multiply what
    others have loaded, num_stages steps ahead (Hopper).
    """

    kernel: str
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 16
    num_warps: int = 4
    num_stages: int = 3
    SWAP: bool = False
    SPLIT_K: int = 1
    label: str = "heuristic"

    def __str__(self) -> str:
        sizes = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}-w{self.num_warps}s{self.num_stages}"
        split = f"-split{self.SPLIT_K}" if self.SPLIT_K > 1 else ""
        return f"{self.kernel}-{sizes}{'-swap' if self.SWAP else ''}{split}"

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def shared(self, problem: ConvProblem) -> int:
        """Bytes of shared memory that the pipelined loads take; the gate compares the compiler's own figure."""
        if self.kernel == "depthwise":
            return 0
        element = ELEMENT_BYTES[problem.dtype]
        if self.kernel == WS:
            ring = self.num_stages * (self.BLOCK_M + self.BLOCK_N) * self.BLOCK_K
            return element * (ring + self.outputs(problem) * self.BLOCK_M * self.BLOCK_N) + 1024
        step = (self.BLOCK_M + self.BLOCK_N) * element + 16 * bool(problem.prologue)
        pipeline = step * self.BLOCK_K * self.num_stages
        if self.kernel not in TMA:
            return pipeline
        # The output leaves from shared memory. A persistent program loads the next tile meanwhile, and where a tile
        # has one step, the residual too. Barriers and alignment take less than 1 KiB.
        block = self.BLOCK_M * self.BLOCK_N * (element if self.SPLIT_K == 1 else 4)
        blocks = block * (1 + (problem.residual and self.steps(problem) == 1))
        return (pipeline + blocks if self.kernel == "gemm1x1" else max(pipeline, block * (1 + problem.residual))) + 1024

    def outputs(self, problem: ConvProblem) -> int:
        """Buffers of "ws" that a residual arrives in and the output leaves from: one filled, one used, one emptied."""
        if self.BLOCK_M * self.BLOCK_N * ELEMENT_BYTES[problem.dtype] > 2**15:
            return 1
        return 3 if problem.residual else 2

    def steps(self, problem: ConvProblem) -> int:
        """Products of BLOCK_K elements that one tile sums up."""
        if flat(problem):
            return cdiv(problem.depth, self.BLOCK_K)
        return problem.R * problem.S * cdiv(problem.C // problem.groups, self.BLOCK_K)

    def instruction(self, dtype: str, arch: int) -> str:
        """The tensor-core instruction that its machine code must hold: "HGMMA", "HMMA", or "" for none."""
        if self.kernel == "depthwise" or dtype == "fp32":
            return ""
        return "HGMMA" if arch == 90 else "HMMA"


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


def arch_class(arch: int) -> int:
    """The architecture whose rows serve `arch`: by its tensor-core instruction and its shared memory."""
    if arch == 90:
        return 90
    return 86 if arch in (86, 89, 120, 121) else 80


def dtype_class(dtype: str) -> str:
    return "half" if dtype in ("fp16", "bf16") else dtype


def flat(problem: ConvProblem) -> bool:
    """Whether the reduction runs over the elements of the window: tap by tap, few channels would fill BLOCK_K badly."""
    return problem.C // problem.groups < 16 and problem.R * problem.S > 1


@functools.lru_cache(maxsize=4096)
def box(problem: ConvProblem, pixels: int) -> tuple[int, int, int]:
    """Images, rows and columns of a box of `pixels` (a power of two) that covers the output with fewest boxes.

    Among equals the one that reads least: the windows of neighbouring pixels overlap, those of two images do not.
    """
    sizes = [1 << i for i in range(pixels.bit_length())]
    shapes = [(pixels // (th * tw), th, tw) for th in sizes for tw in sizes if th * tw <= pixels]

    def cost(shape: tuple[int, int, int]) -> tuple[int, int]:
        nb, th, tw = shape
        boxes = cdiv(problem.N, nb) * cdiv(problem.P, th) * cdiv(problem.Q, tw)
        read = nb * (th * problem.stride[0] + problem.R) * (tw * problem.stride[1] + problem.S)
        return boxes, read

    return min(shapes, key=cost)


@functools.lru_cache(maxsize=4096)
def chosen(tile: Tile | None, problem: Any, arch: int, pick: Callable[[Any, int], Tile],
           why_not: Callable[[Tile, Any, int], str | None]) -> Tile:
    """The given tile, by default the one that `pick` names.

    Raises:
        ValueError: `why_not` has a reason why the tile cannot run the problem.
    """
    tile = tile or pick(problem, arch)
    if reason := why_not(tile, problem, arch):
        raise ValueError(f"{tile} cannot run {problem.id} on sm_{arch}: {reason}")
    return tile


def unfit(tile: Tile, arch: int) -> str | None:
    """Why no kernel of matrix products can have such a tile on `arch`, or None."""
    if arch < 80:
        return f"sm_{arch} is older than sm_80"
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"):
        size = getattr(tile, name)
        if size < 1 or size & (size - 1) or (name.startswith("BLOCK") and size < 16):
            return f"{name}={size} is no power of two" + (" from 16 on" if name.startswith("BLOCK") else "")
    sums = tile.BLOCK_M * tile.BLOCK_N // (32 * tile.num_warps)
    if sums > 128:
        return f"{sums} sums in the registers of one thread, more than 128"
    return None


def legal(tile: Tile, problem: ConvProblem, arch: int) -> str | None:
    """Why `tile` cannot compute `problem` on `arch`, or None."""
    if tile.kernel not in ("gemm", "grouped", "depthwise", *TMA, WS):
        return f"there is no kernel {tile.kernel!r}"
    if tile.kernel == "depthwise" and not problem.depthwise:
        return "the depthwise kernel needs one input channel a group"
    if reason := unfit(tile, arch):
        return reason
    sums = tile.BLOCK_M * tile.BLOCK_N // (32 * tile.num_warps)
    if tile.kernel == "gemm" and problem.device == "cuda":
        residual = problem.residual and tile.SPLIT_K == 1
        if sums > 64 and (problem.prologue or residual):
            return f"{sums} sums of a thread beside a residual or a prologue spill registers"
        if tile.BLOCK_M > 128 and problem.prologue and residual:
            return f"the addresses of {tile.BLOCK_M} pixels beside a residual and a prologue spill registers"
    if tile.SPLIT_K != 1 and (tile.kernel not in ("gemm", *TMA) or not 1 <= tile.SPLIT_K <= tile.steps(problem)):
        return f"SPLIT_K={tile.SPLIT_K} of {tile.steps(problem)} steps of the kernel {tile.kernel}"
    if tile.SWAP and problem.prologue:
        return "a prologue needs the pixels as the first operand, which wgmma can read from registers"
    if tile.instruction(problem.dtype, arch) == "HGMMA":
        rows = tile.BLOCK_N if tile.SWAP else tile.BLOCK_M
        if rows < 64 or tile.num_warps % 4:
            return f"wgmma needs 64 rows and 4 warps, not {rows} and {tile.num_warps}"
    limit, shared = SHARED_LIMIT[arch_class(arch)], tile.shared(problem)
    if shared > limit:
        return f"{shared} bytes of shared memory; sm_{arch} has {limit}"
    if tile.kernel == "grouped":
        return _legal_grouped(tile, problem)
    if tile.kernel == WS:
        return _legal_ws(tile, problem, arch)
    return _legal_tma(tile, problem, arch) if tile.kernel in TMA else None


def _legal_grouped(tile: Tile, problem: ConvProblem) -> str | None:
    cg, kg = problem.C // problem.groups, problem.K // problem.groups
    pack = tile.BLOCK_K // cg
    if pack < 2 or cg & (cg - 1) or kg & (kg - 1):
        return f"{cg} -> {kg} channels a group are not powers of two that fit BLOCK_K={tile.BLOCK_K} twice"
    if problem.groups % pack or tile.BLOCK_N != pack * kg:
        return f"BLOCK_N={tile.BLOCK_N} is not the {kg} channels of each of {pack} out of {problem.groups} groups"
    return None


def _legal_ws(tile: Tile, problem: ConvProblem, arch: int) -> str | None:
    rows, columns = (tile.BLOCK_N, tile.BLOCK_M) if tile.SWAP else (tile.BLOCK_M, tile.BLOCK_N)
    if problem.groups > 1 or problem.prologue:
        return "the kernel with warps that specialise has no groups and no prologue"
    if problem.device == "cuda" and (rows % (16 * tile.num_warps) or tile.num_warps % 4):
        return f"{tile.num_warps} warps do not share {rows} rows in wgmma's blocks of 64"
    if max(rows, columns) > 256 or tile.BLOCK_K * ELEMENT_BYTES[problem.dtype] > 128 or not 2 <= tile.num_stages <= 8:
        return f"{rows} x {columns}, BLOCK_K={tile.BLOCK_K}, {tile.num_stages} stages: up to 256, 128 bytes, 2 to 8"
    sums = rows * columns // (32 * tile.num_warps)
    if not tile.SWAP and sums > 64 and (problem.residual or columns > 128):
        return f"{sums} sums of a thread spill registers beside a residual, or scales and shifts of {columns} channels"
    return _legal_tma(tile, problem, arch)


def _legal_tma(tile: Tile, problem: ConvProblem, arch: int) -> str | None:
    p = problem
    if arch_class(arch) != 90:
        return f"tensor descriptors are used on sm_90, not on sm_{arch}"
    if p.dtype == "fp32" and p.device == "cuda":
        return "fp32 without tensor cores spills registers here"
    if p.residual and tile.SPLIT_K == 1 and not tile.SWAP and tile.BLOCK_M * tile.BLOCK_N > 128 * 128:
        return f"{tile.BLOCK_M} x {tile.BLOCK_N} sums and a residual's block spill registers"
    if p.prologue and tile.BLOCK_M * tile.BLOCK_N > 64 * 32 * tile.num_warps:
        return "more than 64 sums of a thread beside a prologue's pixels spill registers"
    cg, kg = p.C // p.groups, p.K // p.groups
    if any((channels * ELEMENT_BYTES[p.dtype]) % 16 for channels in (p.C, p.K)):
        return f"{p.C} -> {p.K} channels of {p.dtype} are not multiples of 16 bytes"
    if max(p.N * p.P * p.Q, p.depth, p.stride[1] * p.C) > LARGEST_COORDINATE:
        return "a coordinate of a tensor descriptor has 32 bits"
    if tile.kernel == "gemm1x1":
        single = p.R * p.S == p.groups == 1 and p.stride == (1, 1) and p.padding == (0, 0)
        return None if single else "gemm1x1 needs one tap, one group, stride 1 and no padding"
    if cg % tile.BLOCK_K:
        return f"BLOCK_K={tile.BLOCK_K} does not divide {cg} channels: a box would reach into the next tap"
    if p.groups > 1 and kg % tile.BLOCK_N:
        return f"BLOCK_N={tile.BLOCK_N} does not divide the {kg} channels of a group"
    for size, taps, stride, pad in zip((p.H, p.W), (p.R, p.S), p.stride, p.padding, strict=True):
        if size % stride and (taps > 1 or pad):
            return f"stride {stride} does not divide {size}: rows or columns of a view would be of another line"
    return None
