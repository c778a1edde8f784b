"""The executor: runs a conv, its norm, a residual and an activation from the live submodules.

Where a guard fails, the modules themselves run. Our blocks come in through `run`, fused models through
`ambient`, `blocked` and `launch`, so both obey the same rules.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

import torch
from torch import nn

from fused_resnet import backends
from fused_resnet.nn import training
from fused_resnet.nn.guards import (
    ACTIVATIONS,
    CONVS,
    GRAD,
    OLD_HOOKS,
    TENSORS,
    TRAINING,
    activation_blocked,
    ambient,
    blocked,
    gradients,
    hooked,
    is_frozen,
    is_norm,
    norm_blocked,
    pool_blocked,
    pooling_blocked,
    state,
    suggests_channels_last,
)
from fused_resnet.nn.memo import Memo
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.ops import stem
from fused_resnet.problem import ConvOperands, ConvProblem

CHANNELS_LAST = torch.channels_last


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


def launch(x: torch.Tensor, conv: nn.Module, norm: nn.Module | None, activation: str, residual: torch.Tensor | None,
           prologue: tuple[nn.Module, str] | None, finite: bool, reuse: bool = False, pool: bool = False,
           memo: Memo | None = None) -> torch.Tensor | None:
    """One fused launch from live submodules that `blocked` has passed; None where operands do not fit.

    Args:
        x: the input of the convolution, or of the prologue's norm.
        activation: one of `problem.ACTIVATIONS`.
        prologue: (norm, activation) in front of the convolution.
        finite: x and residual are known to hold neither NaN nor Inf.
        reuse: the result may be written over the residual, which nobody reads again.
        pool: a 3x3 max-pool with stride 2 and padding 1 follows a norm, without residual and prologue. It is part of
            the launch where a kernel of the family `stem` is chosen, else a call of its own.
        memo: of this launch, if its caller has one.
    """
    state.kernel = state.pooled = False
    own = vectors(norm)
    before, name = (NO_VECTORS, "") if prologue is None else (vectors(prologue[0]), prologue[1])
    kind = "cpu" if x.is_cpu else x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype is not torch.float64
    if autocast:
        x = x.to(torch.get_autocast_dtype(kind))
    parameters = conv._parameters
    operands = ConvOperands(  # type: ignore[call-arg]
        x, parameters["weight"], parameters["bias"], *own[:4], residual, *before[:4], own[4], before[4], reuse)
    situation = (conv.stride, conv.padding, conv.dilation, conv.groups, type(norm), prologue and type(prologue[0]),
                 activation, name, own[5], before[5], autocast, kind == "cuda" and torch.backends.cudnn.allow_tf32)
    problem = None if memo is None else memo.recall(situation, operands)
    if problem is None:
        for n, steps in ((norm, own[5]), (prologue and prologue[0], before[5])):
            _notice_training(n, steps)
        problem = _problem(operands, conv, norm, prologue, activation, autocast)
        if problem is None:
            return None
        if memo is not None:
            memo.keep(situation, operands, problem)
    finite = finite and x.dtype is not torch.float16
    if pool and _pools(stem_problem := stem.StemProblem(*problem)):
        out = backends.run(stem.FAMILY, stem_problem, operands, finite)
        state.pooled = True
    else:
        out = family.execute(problem, operands, finite)
    state.kernel = backends.last() != "reference"
    return stem.pool(out) if pool and not state.pooled else out


def _pools(problem: stem.StemProblem) -> bool:
    """Whether a kernel computes the convolution together with its pool; the reference would only be slower."""
    try:
        return backends.choose(stem.FAMILY, problem).name != "reference"
    except ValueError:  # the forced backend has none
        return False


def _problem(o: ConvOperands, conv: nn.Module, norm: nn.Module | None, prologue: tuple[nn.Module, str] | None,
             activation: str, autocast: bool) -> ConvProblem | None:
    """The problem that a launch solves, or None where its operands do not fit."""
    x, weight, bias, residual = o.x, o.weight, o.bias, o.residual
    dtype = x.dtype
    if weight.dtype is torch.float64 or prologue is not None if autocast else weight.dtype is not dtype:
        return None  # under autocast stock normalises a prologue in the input's own precision
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
            or norm is not None and not _fits(o[3:7], o.eps, k, x, norm)
            or prologue is not None and not _fits(o[8:12], o.pre_eps, c, x, prologue[0])):
        return None
    shape = family.output_shape(x, weight, stride, padding, dilation)
    if shape is None or residual is not None and (residual.dtype is not dtype or residual.shape != shape
                                                  or not _together(x, residual)):
        return None
    return family.problem_of(x, weight, bias, o.mean, residual, activation, "" if prologue is None else prologue[1],
                             stride, padding, dilation, groups)


NO_VECTORS = (None, None, None, None, 1e-5, None)


def _together(x: torch.Tensor, t: torch.Tensor) -> bool:
    """x.device == t.device in 0.2 us instead of 0.6: this is asked seven times."""
    return t.get_device() == x.get_device() and t.is_cpu is x.is_cpu


def _fits(vectors: tuple, eps: float, size: int, x: torch.Tensor, norm: nn.Module) -> bool:
    """Whether stock takes these vectors beside x and gives x's dtype: one dtype, x's or fp32 beside 16-bit data."""
    dtype = vectors[2].dtype
    # a frozen norm multiplies and adds: fp32 beside 16-bit data gives fp32
    if dtype is not x.dtype and (dtype is not torch.float32 or x.dtype is torch.float64 or is_frozen(norm)):
        return False
    for v in vectors:
        if v is not None and (v.dtype is not dtype or v.dim() != 1 or v.numel() != size or not _together(x, v)):
            return False
    return eps > 0


def vectors(norm: nn.Module | None) -> tuple:
    """(gamma, beta, mean, var, eps) of a norm, as they are now, and the number of its training steps, if it counts."""
    if norm is None:
        return NO_VECTORS
    buffers = norm._buffers
    affine = buffers if "weight" in buffers else norm._parameters
    tracked = buffers.get("num_batches_tracked")
    steps = None if tracked is None or tracked.is_inference() else tracked._version
    return affine.get("weight"), affine.get("bias"), buffers["running_mean"], buffers["running_var"], norm.eps, steps


def live(norm: nn.Module | None) -> tuple:
    """(gamma, beta, mean, var, eps) as they are now; what was folded before training steps is dropped."""
    own = vectors(norm)
    _notice_training(norm, own[5])
    return own[:5]


_steps: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def _notice_training(norm: nn.Module | None, steps: int | None) -> None:
    """Drops what was folded before training steps: batch_norm writes its statistics without a new version."""
    if norm is not None and steps is not None and _steps.setdefault(norm, steps) != steps:
        _steps[norm] = steps
        backends.forget((norm.running_mean, norm.running_var))  # type: ignore[arg-type]


Residual = torch.Tensor | Callable[[], torch.Tensor] | None


def stock(x: Any, conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None, residual: Residual,
          prologue: tuple[nn.Module, nn.Module | None] | None) -> Any:
    """The modules, one after the other; a residual that is yet to be made is made where stock blocks make it."""
    if prologue is not None:
        x = prologue[0](x)
        x = x if prologue[1] is None else prologue[1](x)
    out = conv(x)
    out = out if norm is None else norm(out)
    if residual is not None:
        out += residual() if callable(residual) else residual
    return out if activation is None else activation(out)


_memos: weakref.WeakKeyDictionary[nn.Module, Memo] = weakref.WeakKeyDictionary()


def _separate(x: torch.Tensor, conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None,
              prologue: tuple[nn.Module, nn.Module | None] | None) -> str | None:
    """Why the modules have to run one by one, whatever the residual, or None."""
    if not state.inside:
        reason = ambient((x,), lambda: (p for m in (conv, norm, *(prologue or ())) if m is not None
                                        for p in m.parameters(recurse=False)))
        if reason is not None:
            return reason
    reason = blocked(conv, norm, activation)
    if reason is None and prologue is not None:
        reason = norm_blocked(prologue[0]) or activation_blocked(prologue[1])
    if reason is None and not (state.inside or suggests_channels_last(x)
                               or suggests_channels_last(conv.weight)):  # type: ignore[arg-type]
        reason = "contiguous tensors outside of a planned region: converting costs more than one launch gains"
    return "there is nothing to compute" if reason is None and not x.numel() else reason


def run(x: torch.Tensor, conv: nn.Module, norm: nn.Module | None = None, activation: nn.Module | None = None,
        residual: Residual = None, prologue: tuple[nn.Module, nn.Module | None] | None = None,
        pool: nn.Module | None = None, group: Any = None) -> torch.Tensor:
    """activation(norm(conv(x)) + residual) in one launch where every guard holds, else module by module.

    Args:
        x: [N, C, H, W].
        conv: torch.nn.Conv2d.
        norm: BatchNorm2d with running statistics, or FrozenBatchNorm2d.
        activation: a module of `ACTIVATIONS`.
        residual: [N, K, P, Q], added before the activation, or what makes it: called after conv and norm where these
            run by themselves, so that hooks, errors and side effects come in stock's order.
        prologue: (norm, activation) modules applied to x first.
        pool: applied to the result, within the launch where a kernel of the family `stem` is chosen. Only without
            residual and prologue.
        group: process group that the norm takes the statistics of a batch over.

    Returns:
        [N, K, P, Q], or what the pool makes of it: in channels_last memory inside of a planned region, else with
        stock's strides.

    Raises:
        ValueError: the norm would have to take its statistics over `group` where only the modules can run.
        whatever the modules raise.
    """
    if pool is not None and (not state.inside or norm is None or pool_blocked(pool) is not None):
        return pool(run(x, conv, norm, activation, residual, prologue, group=group))
    if not state.inside:
        residual = functools.cache(residual) if callable(residual) else residual
        out = training.single(x, conv, norm, activation, residual, group) if prologue is None else None
        if out is not None:
            return out
        training.refuse_alone(group, norm)
    if _separate(x, conv, norm, activation, prologue) is None:
        residual = residual() if callable(residual) else residual
        if residual is None or state.inside or ambient((residual,), tuple) is None:
            name = "identity" if activation is None else ACTIVATIONS[type(activation)]
            pre = None if prologue is None else (prologue[0], "identity" if prologue[1] is None
                                                 else ACTIVATIONS[type(prologue[1])])
            memo = _memos.get(conv)
            if memo is None:
                memo = _memos[conv] = Memo()
            out = launch(x, conv, norm, name, residual, pre, state.inside and state.finite, False, pool is not None,
                         memo)
            if out is not None:
                state.finite = state.finite and (state.kernel or not out.is_cpu or backends.all_finite(out))
                return out if state.inside else settle(out)
    state.finite = False
    out = stock(x, conv, norm, activation, residual, prologue)
    return out if pool is None else pool(out)


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


@contextlib.contextmanager
def as_stock() -> Iterator[None]:
    """Inside, all modules of this thread run as they are."""
    before, state.stock = state.stock, True
    try:
        yield
    finally:
        state.stock = before


Forward = TypeVar("Forward", bound=Callable[..., torch.Tensor])


@overload
def planned(forward: Forward) -> Forward: ...


@overload
def planned(*, convert: bool) -> Callable[[Forward], Forward]: ...


def planned(forward: Any = None, *, convert: bool = True) -> Any:
    """Makes a block a region: guards once, channels_last inside, stock's strides outside.

    The forward that is written down is the stock one; compilers read it. Called eagerly, the block's method `fused`
    does the same by `run`.

    Args:
        forward: what is decorated.
        convert: give it x in channels_last; needless where its first launch is all that reads x.
    """
    if forward is None:
        return functools.partial(planned, convert=convert)

    @functools.wraps(forward)
    def region(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or type(x) not in TENSORS:  # whatever traces sees the stock modules
            if getattr(self, "process_group", None) is not None:
                for norm in filter(is_norm, self.modules()):
                    training.refuse_alone(self.process_group, norm)
            return forward(self, x)
        fused: Any = self.fused
        if state.inside:
            return fused(x)
        if self.training or gradients((x,), self.parameters):
            if self._is_full_backward_hook is False:  # OLD_HOOKS
                with as_stock():
                    return fused(x)
            out = training.attempt(self, x)
            return fused(x) if out is None else out
        if ambient((x,), self.parameters) is not None or x.dim() != 4 or not x.numel():
            return fused(x)
        if x.is_cpu and not (x.is_floating_point() and backends.all_finite(x)):
            return fused(x)
        below = survey(self)
        if below.foreign():
            return fused(x)
        keep = suggests_channels_last(x) or below.channels_last()
        state.inside = state.finite = True
        try:
            out = fused(x.contiguous(memory_format=CHANNELS_LAST) if convert else x)
        finally:
            state.inside = False
        return settle(out) if keep else restore(out)

    return region


__all__ = ["ACTIVATIONS", "CONVS", "GRAD", "OLD_HOOKS", "TRAINING", "Memo", "ambient", "as_stock", "blocked",
           "hooked", "is_frozen", "is_norm", "launch", "live", "norm_blocked", "planned", "pool_blocked",
           "pooling_blocked", "restore", "run", "settle", "state", "stock", "suggests_channels_last", "survey"]
