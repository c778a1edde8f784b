"""The executor: runs a conv, its norm, a residual and an activation from the live submodules.

It owns every guard. A guard that fails returns a reason, and then the modules themselves are called
one after the other: same result, same exception, same hooks. Our blocks come in through `run`,
fused models through `ambient`, `blocked` and `launch`, so both obey the same rules.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from fused_resnet import backends
from fused_resnet.ops import conv_bn_act as family

ACTIVATIONS: dict[Any, str] = {nn.Identity: "identity", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu",
                               nn.Hardswish: "hardswish"}
TENSORS = (torch.Tensor, nn.Parameter)
CHANNELS_LAST = torch.channels_last


class _State(threading.local):
    inside = False  # within a region whose guards hold: channels_last
    finite = False  # values of the region are known to hold neither NaN nor Inf
    kernel = False  # the last launch ran on a kernel, which had looked at its weights
    stock = False  # planned forwards step aside


state = _State()


def is_norm(module: nn.Module) -> bool:
    """BatchNorm2d, or a FrozenBatchNorm2d as torchvision and detectron2 write it."""
    return type(module) is nn.BatchNorm2d or is_frozen(module)


def is_frozen(module: nn.Module) -> bool:
    return (type(module).__name__ == "FrozenBatchNorm2d" and hasattr(module, "eps")
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


def restore(t: Any) -> Any:
    """`t` as stock operators on contiguous tensors would have left it."""
    if not isinstance(t, torch.Tensor) or t.dim() != 4:
        return t
    if not t.is_contiguous():
        return t.contiguous()
    _, c, h, w = t.shape  # one pixel or one channel: contiguous already, but strides are visible
    strides = (c * h * w, h * w, w, 1)
    return t if not t.numel() or t.stride() == strides else t.as_strided(t.shape, strides)


def settle(t: Any) -> Any:
    """`t` as stock operators on channels_last tensors would have left it: one pixel is contiguous."""
    return restore(t) if isinstance(t, torch.Tensor) and t.dim() == 4 and t.shape[2] == t.shape[3] == 1 else t


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than the forward of its class."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or "forward" in module.__dict__)


def ambient(tensors: Iterable[Any], parameters: Callable[[], Iterable[torch.Tensor]]) -> str | None:
    """Why the state of PyTorch around this call rules fusion out, or None.

    Args:
        tensors: the inputs.
        parameters: gives the parameters that would be read; asked only when gradients are on.
    """
    if state.stock:
        return "the stock forward was asked for"
    for t in tensors:
        if type(t) not in TENSORS:
            return f"an input is a {type(t).__name__}, not a plain tensor"
        if t.layout is not torch.strided or t.is_meta:
            return "an input is sparse or has no data"
    if torch.is_grad_enabled() and (any(t.requires_grad for t in tensors)
                                    or any(p.requires_grad for p in parameters())):
        return GRAD
    if (torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0 or _watched_functions()):
        return "a dispatch or function mode, a functorch transform or forward-mode AD is active"
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "TorchScript or ONNX export traces the stock modules"
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "global module hooks are registered"
    return None if backends.enabled() else "FUSED_RESNET_DISABLE is set"


def _watched_functions() -> bool:
    """Whether a mode sees torch's Python functions; the one that picks a default device may stay."""
    depth = torch._C._len_torch_function_stack()
    return depth > 0 and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(depth))


GRAD = "gradients are needed: the stock forward runs until training kernels exist"


def blocked(conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None) -> str | None:
    """Why these three modules cannot be run as one launch, or None."""
    if type(conv) is not nn.Conv2d:
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
    if type(norm) is nn.BatchNorm2d and norm.training:
        return TRAINING
    if norm._buffers.get("running_mean") is None or norm._buffers.get("running_var") is None:
        return "the norm keeps no running statistics: it normalises with those of the batch"
    return None


TRAINING = "the norm is in training mode: the stock forward runs until training kernels exist"


def launch(x: torch.Tensor, conv: nn.Module, norm: nn.Module | None, activation: str, residual: torch.Tensor | None,
           prologue: tuple[nn.Module, str] | None, finite: bool, reuse: bool = False) -> torch.Tensor | None:
    """One fused launch from live submodules that `blocked` has passed; None where operands do not fit.

    Args:
        x: the input of the convolution, or of the prologue's norm.
        activation: one of `problem.ACTIVATIONS`.
        prologue: (norm, activation) in front of the convolution.
        finite: x and residual are known to hold neither NaN nor Inf.
        reuse: the result may be written over the residual, which nobody reads again.
    """
    state.kernel = False
    weight: torch.Tensor = conv._parameters["weight"]  # type: ignore[assignment]
    bias = conv._parameters["bias"]
    own = before = NO_VECTORS
    if norm is not None:
        own = vectors(norm)
    name = ""
    if prologue is not None:
        before, name = vectors(prologue[0]), prologue[1]
    dtype = x.dtype
    kind = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(kind) and dtype is not torch.float64:
        if prologue is not None or weight.dtype is torch.float64:
            return None  # stock normalises in the input's own precision
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
    elif weight.dtype is not dtype:
        return None
    stride: tuple[int, int] = conv.stride  # type: ignore[assignment]
    padding: tuple[int, int] = conv.padding  # type: ignore[assignment]
    dilation: tuple[int, int] = conv.dilation  # type: ignore[assignment]
    groups: int = conv.groups  # type: ignore[assignment]
    if x.dim() != 4 or weight.dim() != 4:
        return None
    k, cg = weight.shape[:2]
    c = x.shape[1]
    if (c != cg * groups or k % groups or dtype not in family.NAMES or not _together(x, weight)
            or min(*stride, *dilation) < 1 or min(padding) < 0
            or bias is not None and (bias.dtype is not weight.dtype or bias.numel() != k or not _together(x, bias))
            or norm is not None and not _fits(own, k, x, norm)
            or prologue is not None and not _fits(before, c, x, prologue[0])):
        return None
    shape = family.output_shape(x, weight, stride, padding, dilation)
    if shape is None or residual is not None and (residual.dtype is not dtype or residual.shape != shape
                                                  or not _together(x, residual)):
        return None
    out = family.run(x, weight, bias, *own[:4], residual, *before[:4], own[4], before[4], activation, name, stride,
                     padding, dilation, groups, finite and dtype is not torch.float16, reuse)
    state.kernel = backends.last() != "reference"
    return out


NO_VECTORS = (None, None, None, None, 1e-5)


def _together(x: torch.Tensor, t: torch.Tensor) -> bool:
    """x.device == t.device in 0.2 us instead of 0.6: this is asked seven times a launch."""
    return t.get_device() == x.get_device() and t.is_cpu is x.is_cpu


def _fits(own: tuple, size: int, x: torch.Tensor, norm: nn.Module) -> bool:
    """Whether stock takes these vectors beside x and gives x's dtype: one dtype, x's or fp32 beside 16-bit data."""
    dtype = own[2].dtype
    # a frozen norm multiplies and adds: fp32 beside 16-bit data gives fp32
    if dtype is not x.dtype and (dtype is not torch.float32 or x.dtype is torch.float64 or is_frozen(norm)):
        return False
    for v in own[:4]:
        if v is not None and (v.dtype is not dtype or v.dim() != 1 or v.numel() != size or not _together(x, v)):
            return False
    return own[4] > 0


def vectors(norm: nn.Module) -> tuple:
    """(gamma, beta, mean, var, eps) of a norm, as they are now."""
    buffers = norm._buffers
    _notice_training(norm, buffers.get("num_batches_tracked"))
    affine = buffers if "weight" in buffers else norm._parameters
    return affine.get("weight"), affine.get("bias"), buffers["running_mean"], buffers["running_var"], norm.eps


_steps: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def _notice_training(norm: nn.Module, tracked: torch.Tensor | None) -> None:
    """Drops what was folded before training steps: batch_norm writes its statistics without a new version."""
    if tracked is None or tracked.is_inference():
        return
    version = tracked._version
    if _steps.setdefault(norm, version) != version:
        _steps[norm] = version
        backends.forget((norm.running_mean, norm.running_var))  # type: ignore[arg-type]


def stock(x: Any, conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None, residual: Any,
          prologue: tuple[nn.Module, nn.Module | None] | None) -> Any:
    """The modules, one after the other."""
    if prologue is not None:
        x = prologue[0](x)
        x = x if prologue[1] is None else prologue[1](x)
    out = conv(x)
    out = out if norm is None else norm(out)
    if residual is not None:
        out += residual
    return out if activation is None else activation(out)


def run(x: torch.Tensor, conv: nn.Module, norm: nn.Module | None = None, activation: nn.Module | None = None,
        residual: torch.Tensor | None = None,
        prologue: tuple[nn.Module, nn.Module | None] | None = None) -> torch.Tensor:
    """activation(norm(conv(x)) + residual) in one launch where every guard holds, else module by module.

    Args:
        x: [N, C, H, W].
        conv: torch.nn.Conv2d.
        norm: BatchNorm2d with running statistics, or FrozenBatchNorm2d.
        activation: a module of `ACTIVATIONS`.
        residual: [N, K, P, Q], added before the activation.
        prologue: (norm, activation) modules applied to x first.

    Returns:
        [N, K, P, Q]: in channels_last memory inside of a planned region, else with stock's strides.

    Raises:
        whatever the modules raise.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the stock modules its own way
        return stock(x, conv, norm, activation, residual, prologue)
    reason = None
    if not state.inside:
        tensors = (x,) if residual is None else (x, residual)
        reason = ambient(tensors, lambda: (p for m in (conv, norm, *(prologue or ())) if m is not None
                                           for p in m.parameters(recurse=False)))
    reason = reason or blocked(conv, norm, activation)
    if reason is None and prologue is not None:
        reason = norm_blocked(prologue[0]) or activation_blocked(prologue[1])
    if reason is None and not (state.inside or suggests_channels_last(x)
                               or suggests_channels_last(conv.weight)):  # type: ignore[arg-type]
        reason = "contiguous tensors outside of a planned region: converting costs more than one launch gains"
    if reason is None and not x.numel():
        reason = "there is nothing to compute"
    if reason is None:
        name = "identity" if activation is None else ACTIVATIONS[type(activation)]
        pre = None if prologue is None else (prologue[0], "identity" if prologue[1] is None
                                             else ACTIVATIONS[type(prologue[1])])
        out = launch(x, conv, norm, name, residual, pre, state.inside and state.finite)
        if out is not None:
            state.finite = state.finite and (state.kernel or not out.is_cpu or backends.all_finite(out))
            return out if state.inside else settle(out)
    state.finite = False
    return stock(x, conv, norm, activation, residual, prologue)


class _Survey:
    """What stands below a module. Taken once, because walking a ResNet-50 costs as much as ten launches."""

    def __init__(self, root: nn.Module):
        below = [m for m in root.modules() if m is not root]
        self._children = [(m._modules, dict(m._modules)) for m in (root, *below)]
        self._hooks = [h for m in below for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks,
                                                  m._backward_pre_hooks)]
        self._known = all(type(m).__module__.startswith(("torch.nn.modules.", "fused_resnet.")) or is_frozen(m)
                          for m in below)
        self._convs = [m._parameters for m in below if type(m) is nn.Conv2d]

    def current(self) -> bool:
        return all(now == then for now, then in self._children)

    def foreign(self) -> bool:
        """Whether code that nobody has planned would see tensors of the region: it may rely on stock's strides."""
        return not self._known or any(self._hooks)

    def channels_last(self) -> bool:
        return any(suggests_channels_last(p["weight"]) for p in self._convs)  # type: ignore[arg-type]


_surveys: weakref.WeakKeyDictionary[nn.Module, _Survey] = weakref.WeakKeyDictionary()


def survey(module: nn.Module) -> _Survey:
    found = _surveys.get(module)
    if found is None or not found.current():
        found = _surveys[module] = _Survey(module)
    return found


def planned(forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Makes a block's forward a region: guards once, channels_last inside, stock's strides outside."""

    @functools.wraps(forward)
    def region(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or state.inside:
            return forward(self, x)
        if self.training or ambient((x,), self.parameters) is not None or x.dim() != 4 or not x.numel():
            return forward(self, x)
        if x.is_cpu and not (x.is_floating_point() and backends.all_finite(x)):
            return forward(self, x)
        below = survey(self)
        if below.foreign():
            return forward(self, x)
        keep = suggests_channels_last(x) or below.channels_last()
        state.inside = state.finite = True
        try:
            out = forward(self, x.contiguous(memory_format=CHANNELS_LAST))
        finally:
            state.inside = False
        return settle(out) if keep else restore(out)

    return region
