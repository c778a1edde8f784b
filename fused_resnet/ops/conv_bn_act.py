"""Family `conv_bn_act`: convolution, batch norm, residual add and activation in one launch (inference).

    y = act((conv(pro(x), w) + bias - mean) * gamma / sqrt(var + eps) + beta + residual)
    pro(x) = act_p((x - pre_mean) * pre_gamma / sqrt(pre_var + pre_eps) + pre_beta), or x

Zero padding is applied after `pro`, as stock modules do it. The batch norm uses running statistics,
read live at every launch; sums are kept in fp32 and the result is rounded once. Every kernel gets
x and residual in dense channels_last memory and returns channels_last. Nothing is saved for
backward: with gradients the reference runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fused_resnet import backends
from fused_resnet.library import define_op
from fused_resnet.numerics import NAMES
from fused_resnet.problem import ACTIVATIONS, ConvOperands, ConvProblem

FAMILY = "conv_bn_act"
SCHEMA = (
    f"{FAMILY}(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, "
    "Tensor? residual, Tensor? pre_gamma, Tensor? pre_beta, Tensor? pre_mean, Tensor? pre_var, float eps, "
    "float pre_eps, str activation, str prologue, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups) -> Tensor")
ACTIVATE = {"identity": lambda x: x, "relu": torch.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}


class Prologue(NamedTuple):
    """The batch norm (and activation) in front of a convolution: vectors of [C] in any float dtype."""

    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    eps: float = 1e-5
    activation: str = "relu"


def reference(x, weight, bias, gamma, beta, mean, var, residual, pre_gamma, pre_beta, pre_mean, pre_var, eps, pre_eps,
              activation, prologue, stride, padding, dilation, groups):
    """The stock modules' own operators, one after the other."""
    if prologue:
        x = ACTIVATE[prologue](F.batch_norm(x, pre_mean, pre_var, pre_gamma, pre_beta, False, 0.0, pre_eps))
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if mean is not None:
        y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)
    if residual is not None:
        y = y + residual
    return ACTIVATE[activation](y)


def output_shape(x, weight, stride, padding, dilation):
    """(N, K, P, Q), or None where the padded input is smaller than the kernel."""
    r, s = weight.shape[2], weight.shape[3]
    p = (x.shape[2] + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    q = (x.shape[3] + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    return (x.shape[0], weight.shape[0], p, q) if p > 0 and q > 0 else None


def _fake(x, weight, bias, gamma, beta, mean, var, residual, pre_gamma, pre_beta, pre_mean, pre_var, eps, pre_eps,
          activation, prologue, stride, padding, dilation, groups):
    return torch.empty(output_shape(x, weight, stride, padding, dilation), dtype=x.dtype, device=x.device,
                       memory_format=torch.channels_last)


def problem_of(x, weight, bias, mean, residual, activation, prologue, stride, padding, dilation, groups):
    """The problem that these operands pose, absent ones being None; of x and weight only sizes, dtype and device."""
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    dtype = NAMES[x.dtype]
    if dtype == "fp32" and device == "cuda" and torch.backends.cudnn.allow_tf32:
        dtype = "tf32"
    return ConvProblem(device, dtype, n, h, w, c, k, r, s, stride, padding, dilation, groups, bias is not None,
                       mean is not None, residual is not None, activation, prologue)


def execute(problem: ConvProblem, operands: ConvOperands, finite: bool = False) -> torch.Tensor:
    """Chooses a kernel and launches it. Callers have checked shapes, dtypes and devices.

    Args:
        problem: what `problem_of` says about the operands.
        operands: x and residual in any strides; `reuse` says that the result may be written over the residual.
        finite: the caller has made sure that x and residual hold neither NaN nor Inf.

    Returns:
        [N, K, P, Q] in channels_last memory.
    """
    x, residual = operands.x, operands.residual
    if not x.is_contiguous(memory_format=torch.channels_last):
        operands = operands._replace(x=x.contiguous(memory_format=torch.channels_last))
    if residual is not None and not residual.is_contiguous(memory_format=torch.channels_last):
        operands = operands._replace(residual=residual.contiguous(memory_format=torch.channels_last))
    return backends.run(FAMILY, problem, operands, finite)


def narrowed(o: ConvOperands) -> ConvOperands:
    """With weights in x's dtype: under autocast those of the modules are wider."""
    return o._replace(weight=o.weight.to(o.x.dtype), bias=None if o.bias is None else o.bias.to(o.x.dtype))


def _reference_of(problem: ConvProblem, o: ConvOperands) -> torch.Tensor:
    o = narrowed(o)
    y = reference(*o[:12], o.eps, o.pre_eps, problem.activation, problem.prologue, problem.stride, problem.padding,
                  problem.dilation, problem.groups)
    return y.contiguous(memory_format=torch.channels_last)


def _impl(x, weight, bias, gamma, beta, mean, var, residual, pre_gamma, pre_beta, pre_mean, pre_var, eps, pre_eps,
          activation, prologue, stride, padding, dilation, groups):
    problem = problem_of(x, weight, bias, mean, residual, activation, prologue, tuple(stride), tuple(padding),
                         tuple(dilation), groups)
    return execute(problem, ConvOperands(x, weight, bias, gamma, beta, mean, var, residual, pre_gamma, pre_beta,
                                         pre_mean, pre_var, eps, pre_eps))


backends.register(FAMILY, _reference_of)
OP = define_op(SCHEMA, _impl, _fake, reference)


def conv_bn_act(x: torch.Tensor, weight: torch.Tensor, gamma: torch.Tensor | None = None,
                beta: torch.Tensor | None = None, mean: torch.Tensor | None = None, var: torch.Tensor | None = None, *,
                bias: torch.Tensor | None = None, residual: torch.Tensor | None = None, activation: str = "relu",
                stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0,
                dilation: int | tuple[int, int] = 1, groups: int = 1, eps: float = 1e-5,
                prologue: Prologue | tuple | None = None) -> torch.Tensor:
    """Convolution, batch norm with running statistics, residual add and activation in one launch.

    `y = act((conv(pro(x), w) + bias - mean) * gamma / sqrt(var + eps) + beta + residual)`; batch
    norm as in Ioffe and Szegedy, arXiv:1502.03167, equation in inference mode. Differentiable: when
    anything requires a gradient, the equal sequence of PyTorch operators runs.

    Args:
        x: [N, C, H, W]; fp16, bf16, fp32 or fp64. channels_last memory saves a copy.
        weight: [K, C / groups, R, S], dtype and device of x.
        gamma, beta: [K], scale and shift of the norm; None stands for 1 and 0.
        mean, var: [K], running statistics; both None leaves the norm out.
        bias: [K], of the convolution.
        residual: broadcastable to the output, dtype of x; added before the activation.
        activation: "identity", "relu", "relu6", "silu" or "hardswish".
        stride, padding, dilation: one int, or (rows, columns).
        groups: divides C and K.
        eps: added to var.
        prologue: `Prologue(gamma, beta, mean, var, eps, activation)`, vectors of [C]: a norm and an
            activation in front of the convolution; its zero padding comes after them.

    Returns:
        [N, K, P, Q] in x's dtype and channels_last memory.

    Raises:
        ValueError: an unknown activation, or one of mean and var without the other.
        RuntimeError: whatever torch.nn.functional.conv2d and batch_norm raise for wrong operands.
    """
    for name in (activation, *([prologue[5]] if prologue is not None else [])):
        if name not in ACTIVATIONS:
            raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    if (mean is None) != (var is None):
        raise ValueError("mean and var must be given together")
    pre = Prologue(*prologue) if prologue is not None else Prologue(None, None, None, None, 1e-5, "")  # type: ignore
    args = (x, weight, bias, gamma, beta, mean, var, residual, pre.gamma, pre.beta, pre.mean, pre.var, eps, pre.eps,
            activation, pre.activation, _pair(stride), _pair(padding), _pair(dilation), groups)
    shape = _launchable(*args)
    if shape is None:
        return reference(*args)
    if residual is not None and residual.shape != shape:
        args = (*args[:7], residual.expand(shape), *args[8:])
    return OP(*args)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


def _launchable(x, weight, bias, gamma, beta, mean, var, residual, pre_gamma, pre_beta, pre_mean, pre_var, eps, pre_eps,
                activation, prologue, stride, padding, dilation, groups):
    """The output's shape if every operand fits, else None: the stock operators then raise their own errors."""
    tensors = (x, weight, bias, gamma, beta, mean, var, residual, pre_gamma, pre_beta, pre_mean, pre_var)
    if x is None or weight is None or not all(t is None or isinstance(t, torch.Tensor) for t in tensors):
        return None
    if x.dim() != 4 or weight.dim() != 4 or x.dtype not in NAMES or x.dtype != weight.dtype:
        return None
    if any(t is not None and (t.device != x.device or t.layout != torch.strided) for t in tensors):
        return None
    k, cg = weight.shape[:2]
    c = x.shape[1]
    if groups < 1 or cg * groups != c or k % groups or min(*stride, *dilation) < 1 or min(padding) < 0:
        return None
    vectors = [(t, k) for t in (bias, gamma, beta, mean, var)] + [(t, c) for t in (pre_gamma, pre_beta, pre_mean,
                                                                                    pre_var)]
    if any(t is not None and (t.shape != (size,) or not _norm_dtype(t, x)) for t, size in vectors):
        return None
    if bias is not None and bias.dtype != x.dtype or eps < 0 or pre_eps < 0:
        return None
    shape = output_shape(x, weight, stride, padding, dilation)
    if shape is None:
        return None
    if residual is not None:
        if residual.dtype != x.dtype or residual.dim() > 4:
            return None
        if any(a not in (1, b) for a, b in zip(reversed(residual.shape), reversed(shape), strict=False)):
            return None
    return shape


def _norm_dtype(vector: torch.Tensor, x: torch.Tensor) -> bool:
    """Stock batch norm takes vectors of x's dtype, or fp32 ones beside 16-bit data."""
    return vector.dtype == x.dtype or (vector.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16))
