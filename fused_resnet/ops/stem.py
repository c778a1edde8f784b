"""Family `stem`: convolution, batch norm, activation and the 3x3 max-pool with stride 2 behind them (inference).

    y = maxpool(act((conv(x, w) + bias - mean) * gamma / sqrt(var + eps) + beta)), pool 3x3, stride 2, padding 1

The convolution's output, the largest tensor of a ResNet, is never stored: a kernel reads the image and writes
the pooled map. x may have any strides, because an image of three channels is packed by every kernel anyway.
Batch norm is that of `conv_bn_act`. Nothing is saved for backward: with gradients the reference runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fused_resnet import backends, native, tape
from fused_resnet.library import define_op
from fused_resnet.ops import conv_bn_act as conv
from fused_resnet.problem import ACTIVATIONS, ELEMENT_BYTES, ConvOperands, ConvProblem

FAMILY = "stem"
SCHEMA = (f"{FAMILY}(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, "
          "float eps, str activation, SymInt[2] stride, SymInt[2] padding) -> Tensor")


class StemProblem(ConvProblem):
    """The convolution's problem, whose result is its pooled output; P and Q are those of the convolution."""

    __slots__ = ()

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.K, (self.P + 1) // 2, (self.Q + 1) // 2)

    @property
    def bytes(self) -> int:
        """Fewest bytes through memory: the image read once, the pooled map written once."""
        n, k, p, q = self.output_shape
        moved = self.N * self.C * self.H * self.W + self.K * self.depth + n * k * p * q
        return ELEMENT_BYTES[self.dtype] * moved + 4 * self.K * (4 * self.norm + self.bias)

    @property
    def id(self) -> str:
        return f"{super().id}-pool"


def reference(x, weight, bias, gamma, beta, mean, var, eps, activation, stride, padding):
    """The stock modules' own operators, one after the other."""
    y = F.batch_norm(F.conv2d(x, weight, bias, stride, padding), mean, var, gamma, beta, False, 0.0, eps)
    return F.max_pool2d(conv.ACTIVATE[activation](y), 3, 2, 1)


def _fake(x, weight, bias, gamma, beta, mean, var, eps, activation, stride, padding):
    n, k, p, q = conv.output_shape(x, weight, stride, padding, (1, 1))
    return torch.empty((n, k, (p + 1) // 2, (q + 1) // 2), dtype=x.dtype, device=x.device,
                       memory_format=torch.channels_last)


def run(x, weight, bias, gamma, beta, mean, var, eps, activation, stride, padding):
    """Chooses a kernel and launches it. Callers have checked shapes, dtypes and devices."""
    problem = StemProblem(*conv.problem_of(x, weight, bias, mean, None, activation, "", tuple(stride), tuple(padding),
                                           (1, 1), 1))
    return backends.run(FAMILY, problem, ConvOperands(x, weight, bias, gamma, beta, mean, var, eps=eps))


def reference_of(problem: ConvProblem, o: ConvOperands) -> torch.Tensor:
    """The reference's answer to a problem, in channels_last memory."""
    o = conv.narrowed(o)
    y = reference(o.x, o.weight, o.bias, o.gamma, o.beta, o.mean, o.var, o.eps, problem.activation, problem.stride,
                  problem.padding)
    return y.contiguous(memory_format=torch.channels_last)


def pool(x: torch.Tensor) -> torch.Tensor:
    """The max-pool by itself, of what needs no gradient: PyTorch's makes indices, too, in 1.6 times the time on a CPU.

    Args:
        x: [N, C, H, W] in channels_last memory.

    Returns:
        [N, C, (H + 1) // 2, (W + 1) // 2], channels_last.
    """
    if x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and native.missing("cpu") is None:
        return tape.max_pool(x, (3, 3), (2, 2), (1, 1))
    return torch.max_pool2d(x, 3, 2, 1)


backends.register(FAMILY, reference_of)
OP = define_op(SCHEMA, run, _fake, reference)


def stem(x: torch.Tensor, weight: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None,
         mean: torch.Tensor, var: torch.Tensor, *, bias: torch.Tensor | None = None, activation: str = "relu",
         stride: int | tuple[int, int] = 2, padding: int | tuple[int, int] = 3, eps: float = 1e-5) -> torch.Tensor:
    """The first layers of a ResNet (He et al., arXiv:1512.03385, table 1): convolution to max-pool.

    Differentiable: when anything requires a gradient, the equal sequence of PyTorch operators runs.

    Args:
        x: [N, C, H, W] in any strides; fp16, bf16, fp32 or fp64.
        weight: [K, C, R, S], dtype and device of x.
        gamma, beta: [K], scale and shift of the norm; None stands for 1 and 0.
        mean, var: [K], running statistics.
        bias: [K], of the convolution.
        activation: "identity", "relu", "relu6", "silu" or "hardswish".
        stride, padding: of the convolution; one int, or (rows, columns).
        eps: added to var.

    Returns:
        [N, K, (P + 1) // 2, (Q + 1) // 2] in x's dtype and channels_last memory, [P, Q] being the convolution's output.

    Raises:
        ValueError: an unknown activation.
        RuntimeError: whatever torch.nn.functional.conv2d and batch_norm raise for wrong operands.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    pair, vectors = (conv._pair(stride), conv._pair(padding)), (bias, gamma, beta, mean, var)
    absent = (None,) * 5  # residual and prologue
    fits = conv._launchable(x, weight, *vectors, *absent, eps, eps, activation, "", *pair, (1, 1), 1)
    args = (x, weight, *vectors, eps, activation, *pair)
    if fits is None or mean is None or var is None:
        return reference(*args)
    return OP(*args)
