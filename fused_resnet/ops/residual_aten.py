"""The residual branch as ATen operators: stock's own, in stock's order, so that results are stock's to the last bit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fused_resnet.ops import bits
from fused_resnet.ops.bn_act import passes
from fused_resnet.ops.residual_parts import Branch, Kept, Parts, Stage

WIDTH = len(Parts._fields)
# Looked up once: choosing the overload costs microseconds at every call.
_convolution_backward = torch.ops.aten.convolution_backward.default
_native_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_threshold_backward = torch.ops.aten.threshold_backward.default
_threshold_backward_into = torch.ops.aten.threshold_backward.grad_input


def convolve(x: torch.Tensor, stage: Stage, part: Parts) -> torch.Tensor:
    """u alone."""
    return torch.convolution(x, part.weight, part.bias, stage.stride, stage.padding, stage.dilation, False, (0, 0),
                             stage.groups)


def _activate(z: torch.Tensor, activation: str) -> torch.Tensor:
    """In place: z is fresh."""
    if activation == "relu":
        return z.relu_()
    return F.hardtanh_(z, 0.0, 6.0) if activation == "relu6" else z


def _normalise(u: torch.Tensor, stage: Stage, part: Parts) -> tuple[torch.Tensor, Kept]:
    """norm(u) as stock computes it, running statistics included, and what its gradient needs."""
    z, mean, invstd, reserve, kernel = torch._batch_norm_impl_index(
        u, part.gamma, part.beta, part.running_mean, part.running_var, stage.batch, stage.momentum, stage.eps,
        torch.backends.cudnn.enabled)
    kept = Kept(u, None, None, reserve=reserve if reserve.numel() else None,
                kernel=torch.tensor(kernel) if kernel else None)
    return z, kept._replace(mean=mean, invstd=invstd) if stage.batch else kept


def _again(u: torch.Tensor, stage: Stage, part: Parts) -> torch.Tensor:
    """The stage's activated output, from its convolution's, to the last bit as forward made it.

    That takes the batch's statistics once more: a variance got back from 1 / std would round otherwise, which grows
    from step to step.
    """
    running = (None, None) if stage.batch else (part.running_mean, part.running_var)
    z = torch._batch_norm_impl_index(u, part.gamma, part.beta, *running, stage.batch, 0.0, stage.eps,
                                     torch.backends.cudnn.enabled)[0]
    return _activate(z, stage.activation)


def _mask(grad: torch.Tensor, y: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient before an activation, from its output, in place: `grad` is fresh."""
    if activation == "relu":
        return _threshold_backward_into(grad, y, 0, grad_input=grad)
    if activation == "relu6":
        return torch.ops.aten.hardtanh_backward.grad_input(grad, y, 0.0, 6.0, grad_input=grad)
    return grad


def _norm_backward(dz: torch.Tensor | None, u: torch.Tensor, stage: Stage, part: Parts, kept: Kept,
                   needs: tuple[bool, ...]) -> tuple[torch.Tensor | None, ...]:
    """(du, dgamma, dbeta)."""
    if kept.kernel is None:
        return _native_batch_norm_backward(dz, u, part.gamma, part.running_mean, part.running_var, kept.mean,
                                           kept.invstd, stage.batch, stage.eps, needs)
    reserve = kept.reserve if kept.reserve is not None else torch.empty(0, dtype=torch.uint8, device=u.device)
    return torch.ops.aten._batch_norm_impl_index_backward(
        int(kept.kernel), u, dz, part.gamma, part.running_mean, part.running_var, kept.mean, kept.invstd,  # type: ignore
        stage.batch, stage.eps, needs, reserve)


def forward(spec: Branch, x: torch.Tensor, shortcut: torch.Tensor | None,
            parts: list[Parts]) -> tuple[torch.Tensor, torch.Tensor | None, list[Kept]]:
    """(y, its mask, what each stage keeps); the mask is bits with `recompute`, else y itself stands for it."""
    kept: list[Kept] = []
    a = x
    for stage, part in zip(spec.stages, parts, strict=False):
        z, mine = _normalise(convolve(a, stage, part), stage, part)
        last = len(kept) + 1 == len(spec.stages)
        if not last:
            a = _activate(z, stage.activation)
        kept.append(mine._replace(a=None if last or spec.recompute else a,
                                  u=None if last and spec.recompute else mine.u))
    if spec.projection is not None:
        other, mine = _normalise(convolve(shortcut, spec.projection, parts[-1]),  # type: ignore[arg-type]
                                 spec.projection, parts[-1])
        kept.append(mine._replace(u=None if spec.recompute else mine.u))
        z += other
    elif shortcut is not None:
        z += shortcut
    activation = spec.stages[-1].activation
    y = _activate(z, activation)
    # Stock's ReLU keeps its output, which therefore may serve as the mask; its ReLU6 does not, and readers of that one
    # may write over it. Bits come from the output: what stands at its bounds was held back, or gains nothing.
    bitwise = activation == "relu6" or spec.recompute and activation == "relu"
    return y, bits.pack(passes(y, activation)) if bitwise else None, kept


def before_activation(dy: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """dz from dy; `mask` is bits, or the y of a ReLU, or None where all gradients pass. NaN passes, as in stock."""
    if mask is not None and mask.dtype is torch.uint8:
        # Not torch.where, which took 3.7 ms for a million elements where this took 0.5 (one core, torch 2.13).
        return _threshold_backward(dy, bits.unpack(mask, dy).to(dy.dtype), 0)
    return dy if mask is None else _threshold_backward(dy, mask, 0)


def backward(spec: Branch, dy: torch.Tensor, x: torch.Tensor, reads: torch.Tensor | None, mask: torch.Tensor | None,
             parts: list[Parts], kept: list[Kept], needs: tuple[bool, ...], shared: bool, adds: bool) -> list[Any]:
    """Gradients of (x, shortcut, and Parts of every stage); None where `needs` asks for none.

    Args:
        reads: the projection's input where it is not x.
        mask: see `before_activation`.
        kept: emptied on the way, so that what was used is freed.
        needs: for x, for the shortcut, then for every tensor of `parts`.
        shared: the shortcut is x.
        adds: there is a shortcut.
    """
    grads: list[Any] = [None] * len(needs)
    dz: torch.Tensor | None = before_activation(dy, mask)
    own, other = 0, 0 if shared else 1  # places of the two gradients
    joins = None
    if spec.projection is not None:
        source = x if shared else reads
        mine = kept.pop()
        joins = _through_norm(dz, source, spec.projection, parts[-1], mine, needs[other], needs, grads, len(parts) - 1)
        joins = _through_conv(joins, source, spec.projection, parts[-1], needs[other], needs, grads, len(parts) - 1)
    elif adds and needs[other]:
        joins = dz
    for i in reversed(range(len(spec.stages))):
        stage, part, mine = spec.stages[i], parts[i], kept.pop()
        further = needs[0] or i > 0 and any(needs[2:2 + i * WIDTH])
        source = x
        if i:
            source = kept[-1].a
            if source is None:
                source = _again(kept[-1].u, spec.stages[i - 1], parts[i - 1])  # type: ignore[arg-type]
            kept[-1] = kept[-1]._replace(a=None)
        # Each name is bound anew as soon as its tensor is of no more use, so that the next one finds its memory warm.
        dz = _through_norm(dz, source, stage, part, mine, further, needs, grads, i)
        del mine
        dz = _through_conv(dz, source, stage, part, further, needs, grads, i)
        if dz is None:
            break
        if i:
            dz = _mask(dz, source, spec.stages[i - 1].activation)  # type: ignore[arg-type]
    grads[own] = dz if needs[0] else None
    if joins is not None:
        grads[other] = joins if grads[other] is None else grads[other].add_(joins)
    return grads


def _through_norm(dz: torch.Tensor | None, source: torch.Tensor | None, stage: Stage, part: Parts, kept: Kept,
                  further: bool, needs: tuple[bool, ...], grads: list[Any], index: int) -> torch.Tensor | None:
    """Gradient of the convolution's output where anything behind it needs one; those of gamma and beta go to `grads`.

    Args:
        source: the convolution's input, which makes its output again where that was not kept.
    """
    first = 2 + index * WIDTH
    wanted = needs[first:first + 4]
    u = kept.u if kept.u is not None else convolve(source, stage, part)  # type: ignore[arg-type]
    du, grads[first + 2], grads[first + 3] = _norm_backward(
        dz, u, stage, part, kept, (further or wanted[0] or wanted[1], *wanted[2:]))
    return du


def _through_conv(du: torch.Tensor | None, source: torch.Tensor | None, stage: Stage, part: Parts, further: bool,
                  needs: tuple[bool, ...], grads: list[Any], index: int) -> torch.Tensor | None:
    """Gradient of `source`, the convolution's input, where `further`; those of weight and bias go to `grads`."""
    if du is None:
        return None
    first = 2 + index * WIDTH
    sizes = [part.weight.shape[0]] if part.bias is not None else None
    dx, grads[first], grads[first + 1] = _convolution_backward(
        du, source, part.weight, sizes, stage.stride, stage.padding, stage.dilation, False, (0, 0), stage.groups,
        (further, needs[first], needs[first + 1]))
    return dx
