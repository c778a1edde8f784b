"""The guards: every reason for which modules must run as they are.

A guard that fails returns its reason, and then the modules themselves are called one after the
other: same result, same exception, same hooks. Our blocks and fused models obey the same guards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from fused_resnet import backends
from fused_resnet.nn.parts import ConvPart, FrozenPart, NormPart

ACTIVATIONS: dict[Any, str] = {nn.Identity: "identity", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu",
                               nn.Hardswish: "hardswish"}
TENSORS = (torch.Tensor, nn.Parameter)
PARTS = (ConvPart, NormPart, FrozenPart)
CONVS = (nn.Conv2d, ConvPart)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, NormPart)  # which in eval mode are the same
GLOBAL_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


class _State(threading.local):
    inside = False  # within a region whose guards hold: channels_last
    finite = False  # values of the region are known to hold neither NaN nor Inf
    kernel = False  # the last launch ran on a kernel, which had looked at its weights
    pooled = False  # the last launch computed the pool behind it, too
    stock = False  # planned forwards step aside


state = _State()


def is_norm(module: nn.Module) -> bool:
    """BatchNorm2d, SyncBatchNorm, or a FrozenBatchNorm2d as torchvision and detectron2 write it."""
    return type(module) in NORMS or is_frozen(module)


def is_frozen(module: nn.Module) -> bool:
    return type(module) is FrozenPart or (type(module).__name__ == "FrozenBatchNorm2d" and hasattr(module, "eps")
            and {"weight", "bias", "running_mean", "running_var"} <= module._buffers.keys())


def suggests_channels_last(t: torch.Tensor) -> bool:
    """ATen's suggest_memory_format: whether operators on `t` answer in channels_last."""
    if t.dim() != 4:
        return False
    shape, stride = t.shape, t.stride()
    if stride[1] == 0:
        return False
    smallest = 0
    for d in (1, 3, 2, 0):
        if shape[d] == 0 or stride[d] < smallest or (d == 0 and smallest == stride[1]):
            return False
        smallest = stride[d] * shape[d]
    return True


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than the forward of its class; a part is called without hooks."""
    return type(module) not in PARTS and bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or "forward" in module.__dict__)


def gradients(tensors: Iterable[Any], parameters: Callable[[], Iterable[torch.Tensor]]) -> bool:
    """Whether a graph would be recorded; the parameters are asked for only when gradients are on."""
    return torch.is_grad_enabled() and (any(getattr(t, "requires_grad", False) for t in tensors)
                                        or any(p.requires_grad for p in parameters()))


def ambient(tensors: Iterable[Any], parameters: Callable[[], Iterable[torch.Tensor]] | None) -> str | None:
    """Why the state of PyTorch around this call rules fusion out, or None.

    Args:
        tensors: the inputs.
        parameters: gives the parameters that would be read, where gradients are a reason; None where they are not.
    """
    if state.stock:
        return "the stock forward was asked for"
    for t in tensors:
        if type(t) not in TENSORS:
            return f"an input is a {type(t).__name__}, not a plain tensor"
        if t.layout is not torch.strided or t.is_meta or t.is_nested:
            return "an input is sparse or nested, or has no data"
    if parameters is not None and gradients(tensors, parameters):
        return GRAD
    if (torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0 or _watched_functions()):
        return "a dispatch or function mode, a functorch transform or forward-mode AD is active"
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "TorchScript or ONNX export traces the stock modules"
    if any(getattr(nn.modules.module, f"_global_{hooks}_hooks") for hooks in GLOBAL_HOOKS):
        return "global module hooks are registered"
    return None if backends.enabled() else "FUSED_RESNET_DISABLE is set"


def _watched_functions() -> bool:
    """Whether a mode sees torch's Python functions; the one that picks a default device may stay."""
    depth = torch._C._len_torch_function_stack()
    return depth > 0 and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(depth))


GRAD = "gradients are needed, and no route trains it: the stock forward runs"


# What register_backward_hook gives: the gradients that the last node of autograd returns, which must be stock's node.
OLD_HOOKS = "a deprecated backward hook is registered: it sees single nodes of autograd"


def blocked(conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None) -> str | None:
    """Why these three modules cannot be run as one launch, or None."""
    if type(conv) not in CONVS:
        return f"the convolution is a {type(conv).__name__}, not a plain Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r}"
    for size in (conv.stride, conv.padding, conv.dilation):
        if type(size) is not tuple or len(size) != 2:
            return f"a stride, padding or dilation given as {size!r}"
    if type(conv._parameters.get("weight")) not in TENSORS:
        return "the weight is no plain parameter (pruned, reparametrised, lazy or a tensor subclass)"
    if hooked(conv):
        return "a hook is registered on the convolution"
    if norm is not None:
        reason = norm_blocked(norm)
        if reason is not None:
            return reason
    return activation_blocked(activation)


def activation_blocked(activation: nn.Module | None) -> str | None:
    """Why this activation cannot be part of a launch, or None."""
    if activation is not None and (type(activation) not in ACTIVATIONS or hooked(activation)):
        return f"activation {type(activation).__name__}, or a hook on it"
    return None


def norm_blocked(norm: nn.Module) -> str | None:
    """Why this norm cannot be read live by a kernel, or None."""
    if not is_norm(norm):
        return f"the norm is a {type(norm).__name__}"
    if hooked(norm):
        return "a hook is registered on the norm"
    if type(norm) in NORMS and norm.training:
        return TRAINING
    if norm._buffers.get("running_mean") is None or norm._buffers.get("running_var") is None:
        return "the norm keeps no running statistics: it normalises with those of the batch"
    return None


TRAINING = "the norm is in training mode, and no route trains it: the stock forward runs"


def pool_blocked(pool: nn.Module) -> str | None:
    """Why this module is not the pool that the family `stem` computes, or None."""
    if type(pool) is not nn.MaxPool2d or hooked(pool):
        return f"the pool is a {type(pool).__name__}, or a hook is registered on it"
    return pooling_blocked(pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode,
                           pool.return_indices)


def pooling_blocked(kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: Any = False,
                    return_indices: Any = False) -> str | None:
    """The same for the arguments of `torch.nn.functional.max_pool2d`."""
    for size, wanted in ((kernel_size, 3), (stride, 2), (padding, 1), (dilation, 1)):
        if size != wanted and size != (wanted, wanted):
            return f"a pool of kernel {kernel_size}, stride {stride}, padding {padding}, dilation {dilation}"
    return "a pool with ceil_mode or return_indices" if ceil_mode or return_indices else None
