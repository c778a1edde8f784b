"""Training: a block's convolutions and norms as one residual branch with gradients, from the live submodules.

The norms' semantics are those of torch.nn.BatchNorm2d: which statistics normalise, how the running ones move, what
is counted and when. What does not fit runs module by module, with stock's results and exceptions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fused_resnet import backends
from fused_resnet.nn import guards
from fused_resnet.numerics import NAMES
from fused_resnet.ops import residual_branch, residual_launches
from fused_resnet.ops.residual_parts import ACTIVATIONS, Branch, Parts, Stage


class Unit(NamedTuple):
    """A convolution, the norm behind it and the activation's name; the last one's follows the add."""

    conv: Any  # torch.nn.Conv2d
    norm: Any
    activation: str


def attempt(block: nn.Module, x: Any) -> torch.Tensor | None:
    """The forward of one of our blocks where it trains, or None where it has to run module by module.

    A block says what it is made of by `branch()`: its units as (convolution, norm, activation module) and the module
    of its shortcut, None for the input itself. `recompute` and `process_group` are attributes of it.
    """
    branch = getattr(block, "branch", None)
    if branch is None or guards.ambient((x,), None) is not None:
        return None
    if stock_wins(x, block.recompute, block.process_group):  # type: ignore[arg-type]
        return None
    made, shortcut = branch()
    units = [_unit(*modules) for modules in made]
    if any(unit is None for unit in units):
        return None
    projection = None
    if shortcut is not None:
        if type(shortcut) is not nn.Sequential or guards.hooked(shortcut) or len(shortcut) not in (0, 2):
            return None  # called as it is; the convolutions around it are branches of their own
        if len(shortcut):
            projection = _unit(shortcut[0], shortcut[1], None)
            if projection is None:
                return None
    return run(x, units, x, projection, block.recompute, block.process_group)  # type: ignore[arg-type]


def single(x: Any, conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None,
           residual: Any, group: Any = None) -> torch.Tensor | None:
    """activation(norm(conv(x)) + residual) where it trains, or None where the modules have to run.

    A residual that is yet to be made is made as late as possible: where None is known without it, its maker is not
    called.
    """
    unit = None if norm is None else _unit(conv, norm, activation)
    if unit is None or stock_wins(x, None, group) or guards.ambient((x,), None) is not None:
        return None
    residual = residual() if callable(residual) else residual
    tensors = (x,) if residual is None else (x, residual)
    if residual is not None and guards.ambient((residual,), None) is not None:
        return None
    if not norm.training and not guards.gradients(tensors, lambda: (*conv.parameters(), *norm.parameters())):  # type: ignore
        return None
    return run(x, [unit], residual, group=group)


def _unit(conv: nn.Module, norm: nn.Module, activation: nn.Module | None) -> Unit | None:
    """The modules as a unit, or None where they cannot be one."""
    if guards.activation_blocked(activation) is not None:
        return None
    unit = Unit(conv, norm, "identity" if activation is None else guards.ACTIVATIONS[type(activation)])
    return unit if blocked(unit) is None else None


def blocked(unit: Unit) -> str | None:
    """Why these modules cannot be a stage of a branch, or None."""
    if unit.activation not in ACTIVATIONS:
        return f"activation {unit.activation}: its gradient needs more than its output"
    reason = guards.blocked(unit.conv, None, None)
    if reason is not None:
        return reason
    norm = unit.norm
    if not guards.is_norm(norm):
        return f"the norm is a {type(norm).__name__}"
    if guards.hooked(norm):
        return "a hook is registered on the norm"
    if any(type(p) not in guards.TENSORS for p in norm._parameters.values() if p is not None):
        return "a parameter of the norm is no plain tensor"
    return None


def run(x: torch.Tensor, units: Sequence[Unit], shortcut: torch.Tensor | None = None, projection: Unit | None = None,
        recompute: bool | None = None, group: Any = None) -> torch.Tensor | None:
    """The branch from live modules that `blocked` has passed; None where operands do not fit, before any side effect.

    Args:
        x: [N, C, H, W].
        units: the main path.
        shortcut: tensor to add before the last activation, or the projection's input.
        projection: convolution and norm of the shortcut.
        recompute: save little for backward and make the rest again. False saves what stock saves. None leaves the
            branch to the stock modules unless launches of ours run it; these recompute on a GPU, having saved the time.
        group: process group that all norms take their statistics over.
    """
    if stock_wins(x, recompute, group):
        return None
    device = "cpu" if x.is_cpu else x.device.type
    dtype = x.dtype
    casts = torch.is_autocast_enabled(device)
    if casts and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
    every = [*units, *([projection] if projection is not None else [])]
    group, fits = _group(every, x, group)
    if dtype not in NAMES or x.dtype not in NAMES or not fits:
        return None
    shape: tuple[int, ...] | None = tuple(x.shape)
    for unit in units:
        shape = _shape(shape, unit, dtype, x)
    if shape is None:
        return None
    if projection is not None:
        if shortcut is None or _shape(tuple(shortcut.shape), projection, dtype, x) != shape:
            return None
    elif shortcut is not None and (shortcut.shape != shape or shortcut.dtype is not dtype):
        return None
    with torch.autocast(device, enabled=False) if casts else contextlib.nullcontext():
        same = shortcut is x
        x = x.to(dtype)
        shortcut = x if same else shortcut if shortcut is None else shortcut.to(dtype)
        launches = group is not None or _launches(x, units[0].conv)
        if recompute is None and not launches:
            return None
        parts, stages = zip(*(_stage(unit, dtype) for unit in every), strict=True)
        spec = Branch(stages[:len(units)], stages[-1] if projection is not None else None,
                      x.is_cuda if recompute is None else recompute, launches, group)
        return residual_branch.run(spec, x, shortcut, list(parts))


STOCK_WINS = ("in training the stock modules are the fastest on this device; fuse(model, recompute=True) makes "
              "branches that save memory")


def stock_wins(x: Any, recompute: bool | None, group: Any = None) -> bool:
    """Whether a branch would consist of stock's operators and save nothing: PyTorch's autograd costs less host time."""
    return recompute is None and group is None and isinstance(x, torch.Tensor) and x.is_cpu and (
        not backends.interpreting())


def _launches(x: torch.Tensor, conv: Any) -> bool:
    """Whether a kernel of ours is the choice for the first stage."""
    if x.is_cpu and not backends.interpreting():
        return False
    return backends.choose("conv_bn_stats", residual_launches.conv_problem(x, conv, conv, "")).name != "reference"


def _shape(shape: tuple[int, ...] | None, unit: Unit, dtype: torch.dtype, x: torch.Tensor) -> tuple[int, ...] | None:
    """The output's shape of a unit, or None where stock would complain or answer in another dtype."""
    conv, weight, bias = unit.conv, unit.conv._parameters["weight"], unit.conv._parameters["bias"]
    if shape is None or len(shape) != 4 or weight is None or weight.dim() != 4:
        return None
    stride, padding, dilation, groups = conv.stride, conv.padding, conv.dilation, conv.groups
    k, cg, r, s = weight.shape
    fits = (shape[1] == cg * groups and k % groups == 0 and min(*stride, *dilation) > 0
            and min(padding) >= 0 and weight.device == x.device
            and (weight.dtype is dtype or torch.is_autocast_enabled(x.device.type) and weight.dtype in NAMES
                 and weight.dtype is not torch.float64)
            and (bias is None or bias.dtype is weight.dtype and bias.shape == (k,) and bias.device == x.device)
            and _vectors_fit(unit.norm, k, dtype, x))
    if not fits:
        return None
    p, q = ((size + 2 * pad - dil * (taps - 1) - 1) // step + 1 for size, taps, step, pad, dil in zip(
        shape[2:], (r, s), stride, padding, dilation, strict=True))
    if p < 1 or q < 1 or not shape[0] or takes_batch(unit.norm) and shape[0] * p * q < 2:
        return None
    return shape[0], k, p, q


def _vectors_fit(norm: Any, size: int, dtype: torch.dtype, x: torch.Tensor) -> bool:
    """Whether stock takes the norm's vectors beside data of `dtype` and answers in it."""
    vectors = [*norm._parameters.values(), *(norm._buffers.get(name) for name in ("weight", "bias", "running_mean",
                                                                                   "running_var"))]
    present = [v for v in vectors if v is not None]
    kinds = {v.dtype for v in present}
    narrow = dtype in (torch.float16, torch.bfloat16) and not guards.is_frozen(norm)
    return bool(len(kinds) <= 1 and kinds <= ({dtype, torch.float32} if narrow else {dtype}) and norm.eps > 0
            and all(v.shape == (size,) and v.device == x.device and type(v) in guards.TENSORS for v in present))


def refuse_alone(group: Any, norm: Any) -> None:
    """Modules that run by themselves take statistics of this process alone, which nobody would notice.

    Raises:
        ValueError: `norm` would have to take them over `group`.
    """
    if group is None or norm is None or guards.is_frozen(norm) or not norm.training or (
            torch.distributed.get_world_size(group) == 1):
        return
    raise ValueError(f"process_group: this {type(norm).__name__} cannot take its statistics over a process group here: "
                     "its convolution, dtypes or hooks are none that a fused branch takes")


def takes_batch(norm: Any) -> bool:
    """Whether the norm would normalise with the statistics of the batch."""
    if guards.is_frozen(norm):
        return False
    buffers = norm._buffers
    return norm.training or buffers.get("running_mean") is None and buffers.get("running_var") is None


def _group(units: Sequence[Unit], x: torch.Tensor, given: Any) -> tuple[Any, bool]:
    """(the process group that all norms share, or None; whether they can be run here)."""
    found = set()
    for unit in units:
        if not takes_batch(unit.norm) or not unit.norm.training:
            continue
        if type(unit.norm) is nn.SyncBatchNorm and torch.distributed.is_available() and (
                torch.distributed.is_initialized()):
            found.add(unit.norm.process_group or torch.distributed.group.WORLD)
        else:
            found.add(given)
    if len(found) > 1 or found - {given, None} and x.is_cpu:
        return None, False  # stock's SyncBatchNorm has its own words for a CPU
    group = found.pop() if found else None
    return (group if group is not None and torch.distributed.get_world_size(group) > 1 else None), True


def _stage(unit: Unit, dtype: torch.dtype) -> tuple[Parts, Stage]:
    """Tensors and constants of one unit. Counts the batch, as the norm's forward would."""
    conv, norm = unit.conv, unit.norm
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    batch, momentum = takes_batch(norm), 0.0
    mean, var = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
    if batch:
        if norm.training and not norm.track_running_stats:
            mean = var = None
        tracked = norm._buffers.get("num_batches_tracked")
        momentum = 0.0 if norm.momentum is None else norm.momentum  # type: ignore[assignment]
        if norm.training and norm.track_running_stats and tracked is not None:
            tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(tracked)
    affine = norm._buffers if "weight" in norm._buffers else norm._parameters
    parts = Parts(weight.to(dtype), None if bias is None else bias.to(dtype), affine.get("weight"),  # type: ignore
                  affine.get("bias"), mean, var)
    return parts, Stage(conv.stride, conv.padding, conv.dilation, conv.groups, norm.eps, batch,
                        momentum, unit.activation)
