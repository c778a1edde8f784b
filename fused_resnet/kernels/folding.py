"""Batch norm folded into the convolution in front of it, for backends whose epilogue is a bias.

    w' = w * s,   b' = (bias - mean) * s + beta,   s = gamma / sqrt(var + eps)

computed in fp32 (fp64 for fp64 data) and rounded to the working dtype once.
"""

from __future__ import annotations

import torch

from fused_resnet.problem import ConvOperands


def fold(o: ConvOperands, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The folded (weight [K, C / groups, R, S], bias [K] or None) in `dtype`."""
    wide = torch.promote_types(torch.float32, o.weight.dtype)
    if o.mean is None:
        return o.weight.detach().to(dtype), None if o.bias is None else o.bias.detach().to(dtype)
    scale = torch.rsqrt(o.var.detach().to(wide) + o.eps)
    if o.gamma is not None:
        scale = scale * o.gamma.detach()
    shift = -o.mean.detach().to(wide)
    if o.bias is not None:
        shift = shift + o.bias.detach()
    shift = shift * scale
    if o.beta is not None:
        shift = shift + o.beta.detach()
    return (o.weight.detach().to(wide) * scale[:, None, None, None]).to(dtype), shift.to(dtype)


def sources(o: ConvOperands) -> tuple:
    """The tensors that `fold` reads, as `packed` wants them."""
    return (o.weight, o.bias, o.gamma, o.beta, o.mean, o.var)
