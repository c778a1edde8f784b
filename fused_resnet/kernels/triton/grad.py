"""What `conv_dgrad` and `conv_wgrad` share: du made while it is loaded, the last launch, and where tiles can run."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from fused_resnet.kernels.triton.bn_act_sums import ADD_OPTIONS, add_parts
from fused_resnet.kernels.triton.launch import launch
from fused_resnet.kernels.triton.legal import SHARED_LIMIT, Tile, arch_class, cdiv, power_of_two, unfit
from fused_resnet.kernels.triton.norm import backward_vectors, through_norm
from fused_resnet.problem import ELEMENT_BYTES, ConvProblem, GradOperands

DTYPES = ("fp32", "tf32", "fp16", "bf16")
# Those whose gradient is 0 or 1, which the normalised value tells.
ACTIVATIONS = ("identity", "relu", "relu6")
LARGEST_INDEX = 2**31 - 1


@triton.jit
def du_vectors(u, gamma, mean, var, eps, means, channel, ok, K: tl.constexpr):
    """What `load_du` takes of a channel: of `norm.backward_vectors`, or numbers that nobody reads where u is None."""
    vectors = (0.0, 0.0, 1.0, 0.0)
    if u is not None:
        vectors = backward_vectors(gamma, mean, var, eps, means, channel, ok, K)
    return vectors


@triton.jit
def load_du(dy, u, at, ok, vectors):
    """du at the offsets `at`, in its own type and 0 where not `ok`: as it is stored, or from dz and u."""
    du = tl.load(dy + at, mask=ok, other=0.0)
    if u is not None:
        through = through_norm(du, tl.load(u + at, mask=ok, other=0.0), vectors[0], vectors[1], vectors[2], vectors[3])
        du = tl.where(ok, through, 0.0).to(du.dtype)
    return du


def bind_sum(parts: torch.Tensor, total: torch.Tensor) -> tuple[Any, int, dict[str, Any]]:
    """The launch that adds up `parts` over its first dimension, in blocks of few parts as of many."""
    count, width = parts.shape[0], total.numel()
    rows = min(64, power_of_two(count))
    arguments = {"parts": parts, "sums": total, "PARTS": count, "COLUMNS": width, "BLOCK_P": rows,
                 "BLOCK_C": 2048 // rows}
    return add_parts, cdiv(width, arguments["BLOCK_C"]), arguments


def sum_parts(parts: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Adds up `parts` [n, ...] into `total` [...], both fp32 and contiguous, and returns it."""
    launch(*bind_sum(parts, total), total.device, ADD_OPTIONS)
    return total


def refuse(problem: ConvProblem) -> str | None:
    """Why these kernels cannot run `problem`, or None. Looks at sizes and flags only."""
    if problem.dtype not in DTYPES:
        return f"the Triton kernels compute {', '.join(DTYPES)}, not {problem.dtype}"
    if problem.device == "cpu" and problem.dtype not in ("fp32", "fp16"):
        return f"the Triton interpreter computes fp32 and fp16 only, not {problem.dtype}"
    if problem.prologue and problem.prologue not in ACTIVATIONS:
        return f"the gradient of {problem.prologue!r} is not 0 or 1 everywhere"
    if problem.depthwise:
        return "one input channel a group leaves nothing to multiply in tensor cores"
    return None


@functools.lru_cache(maxsize=4096)
def geometry(problem: ConvProblem) -> dict[str, Any]:
    """The arguments that both kernels take from the problem alone."""
    p = problem
    return {"H": p.H, "W": p.W, "P": p.P, "Q": p.Q, "C": p.C, "K": p.K, "R": p.R, "S": p.S, "GROUPS": p.groups,
            "STRIDE_H": p.stride[0], "STRIDE_W": p.stride[1], "PAD_H": p.padding[0], "PAD_W": p.padding[1],
            "DIL_H": p.dilation[0], "DIL_W": p.dilation[1], "PROLOGUE": p.prologue,
            "PRECISION": "ieee" if p.dtype == "fp32" else "tf32"}


def operands(problem: ConvProblem, o: GradOperands) -> dict[str, Any]:
    """The tensors as the kernels take them: the vectors of a norm that is not there are None."""
    found = o._asdict()
    del found["reuse"]
    if o.u is None:
        found |= dict.fromkeys(("gamma", "mean", "var", "means"))
    if not problem.prologue:
        found |= dict.fromkeys(("pre_gamma", "pre_beta", "pre_mean", "pre_var"))
    return found


def shared(tile: Tile, problem: ConvProblem) -> int:
    """Bytes of shared memory that the pipelined loads take at most, which is with u beside dz."""
    step = (2 * tile.BLOCK_M + tile.BLOCK_N) * ELEMENT_BYTES[problem.dtype]
    return step * tile.BLOCK_K * tile.num_stages + 20 * max(tile.BLOCK_M, tile.BLOCK_K) * tile.num_stages


def legal(kernel: str, tile: Tile, problem: ConvProblem, arch: int, steps: int = 1) -> str | None:
    """Why `tile` cannot compute `problem` with `kernel` on `arch`, or None; `steps` are what SPLIT_K may share out."""
    if tile.kernel != kernel:
        return f"it is a tile of {tile.kernel!r}, not of {kernel!r}"
    if reason := unfit(tile, arch):
        return reason
    if not 1 <= tile.SPLIT_K <= max(steps, 1):
        return f"SPLIT_K={tile.SPLIT_K} of {steps} steps"
    rows = tile.BLOCK_N if tile.SWAP else tile.BLOCK_M
    if tile.instruction(problem.dtype, arch) == "HGMMA" and (rows < 64 or tile.num_warps % 4):
        return f"wgmma needs 64 rows and 4 warps, not {rows} and {tile.num_warps}"
    limit, need = SHARED_LIMIT[arch_class(arch)], shared(tile, problem)
    return f"{need} bytes of shared memory; sm_{arch} has {limit}" if need > limit else None


def period(stride: int, dilation: int) -> int:
    """How many taps lie between two of the same parity class."""
    return stride // math.gcd(stride, dilation)
