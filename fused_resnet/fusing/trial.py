"""Running a route: the first call of each kind is compared with the stock forward, statistics included."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fused_resnet import numerics

if TYPE_CHECKING:
    from fused_resnet.fusing.plan import Plan
    from fused_resnet.fusing.route import Route


def run(plan: Plan, route: Route, args: tuple) -> Any:
    """The route's answer, or stock's at the first call of a kind if it says something else."""
    plain = plan.contiguous(args)
    convert = bool(plain) and not plan.keep
    key = (route.mode, torch.is_grad_enabled(), *plan.kind(args, plain))
    if plan.keep:
        args = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in args)
    if key in plan.checked:
        return route.run(args, convert, plan.recompute)
    if route.opaque and torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True):
        # A checkpoint compares what is saved now, by stock, with what the route would save when it runs again.
        plan._note("saved-tensor hooks or a checkpoint, before a first call without them was compared with stock")
        return type(plan.module).forward(plan.module, *args)
    if route.opaque:
        return _judge_behind(plan, route, args, convert, key)
    return _judge_ahead(plan, route, args, convert, key)


def _judge_ahead(plan: Plan, route: Route, args: tuple, convert: bool, key: tuple) -> Any:
    """Stock runs first and without a graph, so that the step needs no more memory than the route's."""
    from fused_resnet.fusing.plan import difference

    rewind = _Rewind(plan.module, args[0])
    with plan.listening(), torch.no_grad():
        expected = type(plan.module).forward(plan.module, *args)
    wanted = rewind.buffers()
    rewind()
    problem = None
    try:
        result = route.run(args, convert, plan.recompute)
        problem = difference(result, expected, args) or _drift(rewind.buffers(), wanted)
    except torch.OutOfMemoryError:
        rewind()
        return type(plan.module).forward(plan.module, *args)
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        problem = f"it raised {type(error).__name__}: {error}"
    if problem is None:
        plan.checked.add(key)
        return result
    _give_up(plan, problem)
    rewind()
    return type(plan.module).forward(plan.module, *args)


def _judge_behind(plan: Plan, route: Route, args: tuple, convert: bool, key: tuple) -> Any:
    """Stock's answer counts, because modules that are not understood must be called once and with a graph."""
    from fused_resnet.fusing.plan import difference

    rewind = _Rewind(plan.module, args[0])
    with plan.listening(route.opaque) as answers:
        expected = type(plan.module).forward(plan.module, *args)
    after = _Rewind(plan.module, args[0])
    foreign = {id(b) for m in route.opaque for b in m.buffers()}
    watched = {name: after.values[name] for name, b in plan.module.named_buffers() if id(b) not in foreign}
    rewind()
    try:
        with torch.no_grad():
            result = route.run(args, convert, plan.recompute, answers)
        problem = difference(result, expected, args) or _drift(rewind.buffers(), watched)
    except torch.OutOfMemoryError:
        return expected
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        problem = f"it raised {type(error).__name__}: {error}"
    finally:
        after()
    if problem is None:
        plan.checked.add(key)
    else:
        _give_up(plan, problem)
    return expected


def _give_up(plan: Plan, problem: str) -> None:
    plan.routes = dict.fromkeys((False, True), f"the training steps disagreed with the stock forward: {problem}")
    warnings.warn(f"fused_resnet trains a {type(plan.module).__name__} stock: {problem}. Please report this line with "
                  f"the source of its forward.", stacklevel=5)


class _Rewind:
    """Puts buffers and random numbers back to where they were."""

    def __init__(self, module: nn.Module, x: torch.Tensor):
        self.module, self.device = module, x.device
        self.values = self.buffers()
        self.chance = torch.get_rng_state()
        self.device_chance = torch.cuda.get_rng_state(x.device) if x.is_cuda else None

    def buffers(self) -> dict[str, torch.Tensor]:
        return {name: b.detach().clone() for name, b in self.module.named_buffers()}

    @torch.no_grad()
    def __call__(self) -> None:
        for name, b in self.module.named_buffers():
            if not torch.equal(b, self.values[name]):
                with _unversioned(b):
                    b.copy_(self.values[name])
        torch.set_rng_state(self.chance)
        if self.device_chance is not None:
            torch.cuda.set_rng_state(self.device_chance, self.device)


@contextlib.contextmanager
def _unversioned(b: torch.Tensor) -> Iterator[None]:
    """Writes inside are not seen by autograd: they put back what a graph may have saved."""
    with contextlib.nullcontext() if b.is_inference() else torch.autograd._unsafe_preserve_version_counter(b):
        yield


def _drift(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str | None:
    """Which buffer has another value than after the stock forward, or None."""
    for name, b in theirs.items():
        if not b.is_floating_point():
            if not torch.equal(mine[name], b):
                return f"{name} is {mine[name].tolist()} in place of {b.tolist()}"
            continue
        limit = 1e-2 if b.dtype in (torch.float32, torch.float64) else 0.1
        if b.numel() and numerics.measure(mine[name], b).rel > limit:
            return f"{name} moved to another value"
    return None
