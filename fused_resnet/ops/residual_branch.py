"""Family `residual_branch`: the convolutions and batch norms of a residual block with their gradients, as one node.

    z_i = norm_i(conv_i(a_(i-1))),  a_i = act_i(z_i),  a_0 = x            for the stages i = 1 .. L - 1
    y   = act_L(z_L + shortcut),  shortcut = nothing, a tensor, or norm_p(conv_p(x_p))

A norm takes the statistics of the batch (Ioffe and Szegedy 2015, arXiv:1502.03167) or fixed ones. Stock autograd
saves u_i = conv_i(..), a_i and y of every stage. Saved here is the same, less what `recompute` makes again:
with it, u_i of the inner stages, one bit for each element of y's mask and vectors of [K] stay; backward
normalises once more and runs the last convolution (and the projection) once more. Gradient with
M elements a channel, xhat = (u - mean) / std and dz = dy where z + shortcut > 0:

    du = gamma / std * (dz - mean(dz) - xhat * mean(dz * xhat)),  dgamma = sum(dz * xhat),  dbeta = sum(dz)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fused_resnet import backends
from fused_resnet.ops import bits, residual_aten, residual_launches
from fused_resnet.ops.conv_bn_act import ACTIVATE
from fused_resnet.ops.residual_parts import Branch, Kept, Parts, Stage


def run(spec: Branch, x: torch.Tensor, shortcut: torch.Tensor | None, parts: list[Parts]) -> torch.Tensor:
    """The block's output, differentiable in everything but running statistics.

    Args:
        spec: constants; `parts` has one entry a stage, and the projection's last.
        x: [N, C, H, W].
        shortcut: [N, K, P, Q] to add, or the projection's input, or None for nothing to add. May be x itself.

    Returns:
        [N, K, P, Q] in x's dtype, with the strides that the stock operators give. Running statistics are updated.
    """
    tensors = [t for part in parts for t in part]
    apply = _Branch.apply if torch._C._are_functorch_transforms_active() else _apply
    return apply(spec, x, shortcut, *tensors)[0]


def _split(tensors: Any, kind: Any) -> list[Any]:
    width = len(kind._fields)
    return [kind(*tensors[i:i + width]) for i in range(0, len(tensors), width)]


class _Branch(torch.autograd.Function):
    """Outputs: y, the bits of its mask or None, and `Kept` of every stage; only y is for the caller."""

    @staticmethod
    def forward(spec: Branch, x: torch.Tensor, shortcut: torch.Tensor | None, *tensors: Any) -> tuple:
        way = residual_launches if spec.launches else residual_aten
        y, mask, kept = way.forward(spec, x, shortcut, _split(tensors, Parts))
        return y, mask, *(t for mine in kept for t in mine)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        spec, x, shortcut, *tensors = inputs
        y, mask, *kept = output
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.shared, ctx.adds = spec, shortcut is x, shortcut is not None
        ctx.forced = backends.forced() if spec.launches else None  # on CUDA another thread runs backward
        if mask is None and spec.stages[-1].activation != "identity":
            mask = y
        ctx.layout = torch.contiguous_format if y.is_contiguous() else torch.channels_last  # of the mask's bits
        reads = shortcut if spec.projection is not None and not ctx.shared else None
        # Running statistics that move are none of backward's business, and the next forward writes them.
        stages = (*spec.stages, *([spec.projection] if spec.projection is not None else []))
        parts = (part._replace(running_mean=None, running_var=None) if stage.batch else part
                 for stage, part in zip(stages, _split(tensors, Parts), strict=True))
        ctx.save_for_backward(x, reads, mask, *(t for part in parts for t in part), *kept)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        spec: Branch = ctx.spec
        x, reads, mask, *tensors = ctx.saved_tensors
        given = (len(spec.stages) + (spec.projection is not None)) * len(Parts._fields)
        parts, kept = _split(tensors[:given], Parts), _split(tensors[given:], Kept)
        del tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or _mapped(dy):
            return None, *_twice(spec, dy, x, reads, mask, ctx.layout, parts, needs, ctx.shared, ctx.adds)
        if mask is not None and mask.dtype is torch.uint8:
            dy = dy.contiguous(memory_format=ctx.layout)
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained: what backward is done with is freed at once
        given_back = (spec, dy, x, reads, mask, parts, kept, needs, ctx.shared, ctx.adds)
        if not spec.launches:
            return None, *residual_aten.backward(*given_back)
        with backends.use(ctx.forced):
            return None, *residual_launches.backward(*given_back)


def _mapped(t: torch.Tensor) -> bool:
    """Whether `t` stands for many: under vmap, or by is_grads_batched."""
    return (torch._C._functorch.peek_interpreter_stack() is not None or torch._C._functorch.is_legacy_batchedtensor(t))


# Function.apply without the binding of default arguments, which takes as long as a small convolution.
_apply = super(torch.autograd.Function, _Branch).apply


def _twice(spec: Branch, dy: torch.Tensor, x: torch.Tensor, reads: torch.Tensor | None, mask: torch.Tensor | None,
           layout: torch.memory_format, parts: list[Parts], needs: tuple[bool, ...], shared: bool,
           adds: bool) -> list[Any]:
    """Gradients that can be differentiated or mapped: of the stock operators, run again on the saved operands.

    The shortcut's tensor is not saved; activations that the output tells are linear between their kinks, so the
    mask of the first run stands for them.
    """
    if spec.group is not None:
        raise RuntimeError("residual_branch: gradients of gradients are not available with statistics over a process "
                           "group; use the stock modules (fused_resnet.unfuse)")

    def norm(u: torch.Tensor, stage: Stage, part: Parts) -> torch.Tensor:
        running = (None, None) if stage.batch else (part.running_mean, part.running_var)
        return F.batch_norm(u, *running, part.gamma, part.beta, stage.batch, 0.0, stage.eps)  # type: ignore[arg-type]

    with torch.enable_grad():
        z = x
        for i, (stage, part) in enumerate(zip(spec.stages, parts, strict=False)):
            z = norm(residual_aten.convolve(z, stage, part), stage, part)
            if i + 1 < len(spec.stages):
                z = ACTIVATE[stage.activation](z)
        other = 0 if shared else 1
        if spec.projection is not None:
            source = x if shared else reads
            z = z + norm(residual_aten.convolve(source, spec.projection, parts[-1]),  # type: ignore[arg-type]
                         spec.projection, parts[-1])
    if mask is None:
        dz = dy
    elif mask.dtype is torch.uint8:
        like = torch.empty(z.shape, dtype=torch.bool, device=z.device, memory_format=layout)
        dz = torch.where(bits.unpack(mask, like), dy, torch.zeros((), dtype=dy.dtype, device=dy.device))
    else:
        dz = residual_aten.before_activation(dy, mask.detach())
    given: list[Any] = [x, reads, *(t for part in parts for t in part)]
    wanted = [i for i, need in enumerate(needs) if need and given[i] is not None]
    found = torch.autograd.grad(z, [given[i] for i in wanted], dz, create_graph=torch.is_grad_enabled(),
                                allow_unused=True)
    grads: list[Any] = [None] * len(needs)
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    if adds and spec.projection is None and needs[other]:
        grads[other] = dz if grads[other] is None else grads[other] + dz
    return grads
