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
    return "winograd4" if "winograd4" in able and _reused(p) else able[0]


def _reused(p: ConvProblem) -> bool:
    """Whether transformed weights, four times as many, are read for enough tiles to be worth their way from memory."""
    tiles = p.N * -(-p.P // 4) * -(-p.Q // 4)
    return tiles >= p.C // 32 and (p.dtype == "fp32" or p.C <= 128)


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
