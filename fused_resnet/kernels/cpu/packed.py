"""conv + BN + residual + activation by the native library's own kernels, with weights that it packs once.

`direct` multiplies patches, `winograd2` and `winograd4` are Winograd's F(2x2, 3x3) and F(4x4, 3x3), which multiply 2.25
and 4 times less and always in fp32; `grouped` takes groups of few channels, and adds in fp32. The norm stays out of the
weights: sums are scaled and shifted in fp32, the residual is added and the result rounded once, all in registers.
"""

from __future__ import annotations

import torch

from fused_resnet import native, tape
from fused_resnet.kernels.folding import sources
from fused_resnet.kernels.packing import packed
from fused_resnet.problem import ConvOperands, ConvProblem
from fused_resnet.settings import setting

WINOGRAD = ("winograd4", "winograd2")
METHODS = ("direct", *WINOGRAD, "grouped")
LANES = 16  # of the widest vectors: channels in these multiples fit every processor's
GROUPED = (1, 2, 4, 8)  # channels of a group
UNIT = (1, 1)


def refuse(problem: ConvProblem, method: str) -> str | None:
    """Why a method cannot run `problem`, or None."""
    p = problem
    if p.dtype not in ("fp32", "bf16"):
        return f"our kernels on the CPU compute fp32 and bf16, not {p.dtype}"
    if max(p.N, p.C, p.H, p.W, p.K, p.P, p.Q, p.depth) >= 2**30:
        return "a size or a sum is longer than 2^30"
    if method in WINOGRAD:
        if setting("WINOGRAD", "1") == "0":
            return "FUSED_RESNET_WINOGRAD=0 switches Winograd's algorithm off"
        if (p.R, p.S, p.stride, p.dilation, p.groups) != (3, 3, UNIT, UNIT, 1) or p.C % LANES or p.K % LANES:
            return f"Winograd's algorithm takes dense 3x3 kernels, stride 1, and channels in multiples of {LANES}"
    if method == "grouped" and (p.C != p.K or p.C < LANES or p.C // p.groups not in GROUPED):
        return f"grouped takes groups of {GROUPED} channels and as many filters, and at least {LANES} channels"
    return native.refusal("cpu")


def forward(problem: ConvProblem, o: ConvOperands, x: torch.Tensor, method: str) -> torch.Tensor:
    """One launch on x, what the prologue made of `o.x`; see `refuse`."""
    p = problem
    pack = packed((method, x.dtype, p.dilation[1] > 1, o.eps), sources(o), lambda: _pack(p, o, x.dtype, method))
    return tape.conv(x, pack, o.residual, o.reuse, p.output_shape, (p.R, p.S), p.stride, p.padding, p.dilation,
                     p.groups, p.activation, method)


def _pack(problem: ConvProblem, o: ConvOperands, dtype: torch.dtype, method: str) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        vectors = [None if v is None else v.detach() for v in o[2:7]]
        return torch.ops.fused_resnet._conv_pack.default(
            o.weight.detach().to(dtype), *vectors, o.eps, problem.dilation, problem.groups, method)
