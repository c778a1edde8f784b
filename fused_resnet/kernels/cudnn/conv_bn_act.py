"""conv + BN + [residual] + ReLU on cuDNN: `aten::cudnn_convolution_relu` and `_add_relu`.

The norm is folded in fp32 into channels_last weights that are kept while nothing changes: the ops
would otherwise copy the weights at every call.
"""

from __future__ import annotations

import torch

from fused_resnet.kernels.folding import fold, sources
from fused_resnet.kernels.packing import packed
from fused_resnet.problem import ConvOperands, ConvProblem

FOLDED = True


def refuse(problem: ConvProblem) -> str | None:
    """Why cuDNN's fused operators cannot run `problem`, or None."""
    if problem.device != "cuda":
        return f"runs on CUDA, the tensors are on {problem.device}"
    if not torch.backends.cudnn.is_available() or not torch.backends.cudnn.enabled:
        return "this build of PyTorch has no cuDNN, or it is switched off"
    if problem.dtype == "fp64":
        return "cuDNN's fused operators do not run fp64"
    if problem.prologue:
        return "cuDNN's fused operators have no prologue"
    # Without ReLU there is only aten::cudnn_convolution, which takes no bias: the folded shift would be a second
    # launch, as the batch norm of stock is, at the price of weights that are rounded once more.
    if problem.activation != "relu":
        return f"cuDNN's fused operators end in ReLU, not {problem.activation}"
    if problem.groups > 1:
        return "cuDNN's fused operators are slow for grouped convolutions (PyTorch #34977)"
    return None


def needs_finite(problem: ConvProblem) -> bool:
    """Whether cuDNN's ReLU keeps NaN is up to the engine that it picks: take no chance."""
    return False


def forward(problem: ConvProblem, o: ConvOperands) -> torch.Tensor:
    """One launch of cuDNN."""
    dtype = o.x.dtype

    def build() -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = fold(o, dtype)
            return weight.contiguous(memory_format=torch.channels_last), bias

    weight, bias = packed(("cudnn", dtype, o.eps), sources(o), build)
    if problem.residual:
        return torch.cudnn_convolution_add_relu(o.x, weight, o.residual, 1.0, bias, problem.stride, problem.padding,
                                                problem.dilation, problem.groups)
    return torch.cudnn_convolution_relu(o.x, weight, bias, problem.stride, problem.padding, problem.dilation,
                                        problem.groups)
