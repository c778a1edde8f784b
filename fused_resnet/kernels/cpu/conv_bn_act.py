"""conv + BN + residual + activation on the CPU: oneDNN's convolutions through PyTorch or our own, the faster ones.

A tile names the kernel: "onednn", or a method of `packed`. `default` says which one runs what nobody has tuned. None
has a prologue, which runs as one pass of its own in front.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fused_resnet.kernels.cpu import onednn, packed
from fused_resnet.kernels.packing import packed as kept
from fused_resnet.problem import ConvOperands, ConvProblem

FOLDED = True


@dataclass(frozen=True)
class Tile:
    """Who computes the convolution."""

    kernel: str


def refuse(problem: ConvProblem) -> str | None:
    """Why no kernel here can run `problem`, or None."""
    if problem.device != "cpu":
        return f"runs on the CPU, the tensors are on {problem.device}"
    if problem.prologue and not (problem.norm or problem.residual or problem.activation != "identity"):
        return "no kernel for the CPU has a prologue, and nothing follows the convolution"
    return None if candidates(problem) else onednn.refuse(problem)


def needs_finite(problem: ConvProblem) -> bool:
    """oneDNN clips with max(x, 0), which turns NaN into 0; Winograd's sums carry NaN to neighbouring pixels."""
    return onednn.needs_finite(problem) or any(packed.refuse(problem, name) is None for name in packed.WINOGRAD)


def candidates(problem: ConvProblem) -> list[Tile]:
    """The kernels that can run `problem`, oneDNN first."""
    own = [Tile(name) for name in packed.METHODS if packed.refuse(problem, name) is None]
    return [*([Tile("onednn")] if onednn.refuse(problem) is None else []), *own]


def default(problem: ConvProblem) -> dict[str, Any]:
    """The tile that runs `problem` without a measured row."""
    return asdict(Tile(_default(problem)))


def _default(p: ConvProblem) -> str:
    able = [tile.kernel for tile in candidates(p)]
    if "grouped" in able and ("onednn" not in able or _grouped_wins(p)):
        return "grouped"  # never "direct", which takes 3 to 500 times as long
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return able[0]  # no other processor has been measured
    plain = "direct" if "direct" in able and ("onednn" not in able or _direct_wins(p)) else able[0]
    ways = [plain, *(name for name in packed.WINOGRAD if name in able)]
    return min(ways, key=lambda name: _cost(p, name))


def _grouped_wins(p: ConvProblem) -> bool:
    """Where ours was faster than oneDNN on one Zen 5 core: groups of 4 (1.6 to 3 x), and of 8 in fp32 (1.5 to 2 x).

    Depthwise it was so for single images of 14x14 and 7x7 alone (1.1 to 1.5 x, most of it the call), at larger sizes
    and batches oneDNN is up to 2 x faster; as it is in bf16 for groups of 8 (1.0 to 1.2 x), and of 16 (1.3 to 2.3 x).
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False  # no other processor has been measured
    channels = p.C // p.groups
    if channels == 1:
        return p.stride == (1, 1) and p.N * p.P * p.Q <= 196 and p.flops <= 2.1e6
    return channels in (2, 4) or p.dtype == "fp32"


def _direct_wins(p: ConvProblem) -> bool:
    """Where ours was faster than oneDNN on two Zen 5 cores, or as fast and no tape has to end for it.

    Few pixels (1 to 1.5 x), deep sums in bf16 (1 to 1.3 x), long rows of y under a kernel (1 to 1.2 x), and what widens
    64 channels (1.2 x). About as fast (0.93 to 1.13 x): 32 to 64 channels to whole panels of filters, on maps of up to
    56x56. In bf16 filters that end within a vector are finished one by one (0.3 to 0.9 x), which costs less than their
    weights only on maps of one pixel (2048 -> 1000 on two Zen 4 cores 0.8 to 2.4 x).
    """
    if p.groups != 1 or p.dtype == "bf16" and p.K % packed.LANES and p.P * p.Q > 1:
        return False
    deep = p.dtype == "bf16" and p.depth >= 128
    even = p.K % (2 * packed.LANES) == 0 and p.P * p.Q <= 3136
    wide = 32 <= p.depth <= 64 and (p.K >= 4 * p.C or even)
    return p.N * p.P * p.Q <= 4096 or deep or p.R * p.S > 1 and p.Q >= 28 or wide


# Of two Zen 5 cores: fp32 multiply-adds for which one byte comes from memory, times two; measured 490 GFLOP/s, 40 GB/s.
FLOPS_A_BYTE = 12
SAVING = {"winograd2": 2.25 / 1.2, "winograd4": 4 / 1.25}  # what the transforms leave of it


def _cost(p: ConvProblem, name: str) -> float:
    """Time in units of an fp32 flop: of the arithmetic, or of the weights' way from memory where that is longer."""
    half = 2 if p.dtype == "bf16" else 1
    if name not in SAVING:
        return max(p.flops / half, FLOPS_A_BYTE * p.K * p.depth * 4 / half)
    m = int(name[-1])
    waste = (-(-p.P // m) * m) * (-(-p.Q // m) * m) / (p.P * p.Q)  # tiles reach over the edge
    return max(p.flops * waste / SAVING[name], FLOPS_A_BYTE * p.K * p.C * 4 * (m + 2) ** 2)


def with_tile(tile: dict[str, Any]) -> Callable[[ConvProblem, ConvOperands], torch.Tensor]:
    """`forward` by the kernel of a row."""
    return functools.partial(forward, tile=Tile(**tile))


def forward(problem: ConvProblem, o: ConvOperands, tile: Tile | None = None) -> torch.Tensor:
    """One launch; a prologue adds a pass. Returns NotImplemented where weights that are folded are not finite."""
    if problem.prologue and needs_finite(problem) and not kept(("finite", o.pre_eps), o[8:12], lambda: _steady(o)):
        return NotImplemented
    x = o.x if not problem.prologue else _prologue(problem, o)
    kernel = tile.kernel if tile is not None else _default(problem)
    return onednn.forward(problem, o, x) if kernel == "onednn" else packed.forward(problem, o, x, kernel)


def _steady(o: ConvOperands) -> bool:
    """Whether the prologue makes finite values of finite ones."""
    vectors = (torch.rsqrt(o.pre_var + o.pre_eps), o.pre_mean, o.pre_gamma, o.pre_beta)
    return all(bool(torch.isfinite(v).all()) for v in vectors if v is not None)


def _prologue(problem: ConvProblem, o: ConvOperands) -> torch.Tensor:
    x = F.batch_norm(o.x, o.pre_mean, o.pre_var, o.pre_gamma, o.pre_beta, False, 0.0, o.pre_eps)
    return onednn.ACTIVATE[problem.prologue](x)
