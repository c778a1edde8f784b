"""The steps of a plan: fused launches, and whatever stands between them as it is.

Steps read and write numbered values. Between planned operations values are in channels_last; one is
`loose` while its strides are not those that stock gives it, and a step that might care gets it put
right first.
"""

from __future__ import annotations

import collections
import importlib
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet import backends
from fused_resnet.fusing.match import ADDS, FUNCTIONS
from fused_resnet.fusing.parts import Modules
from fused_resnet.nn import executor
from fused_resnet.nn.parts import ConvPart, FrozenPart, NormPart

# What these make of finite values is finite, in whatever layout.
STEADY = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.MaxPool2d, nn.AvgPool2d,
          nn.AdaptiveAvgPool2d)
STEADY_FUNCTIONS = {*(f for f in FUNCTIONS if callable(f)), *(f for f in ADDS if callable(f)), torch.cat, torch.sigmoid,
                    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.hardsigmoid}
# These take any layout, too. Whatever is not named here gets the strides of stock.
LAYOUT_FREE = (*STEADY, nn.Conv2d, nn.BatchNorm2d, nn.Linear, ConvPart, NormPart, FrozenPart)
LAYOUT_FREE_FUNCTIONS = {*STEADY_FUNCTIONS, operator.mul, torch.mul}


class Slot(NamedTuple):
    """A numbered value of the plan, where an argument stands."""

    at: int
    loose: bool = False


class Call:
    """One node that runs as it stands."""

    heeded = True  # a launch follows, which may have to know whether values are finite

    def __init__(self, kind: str, target: Any, args: tuple, kwargs: dict, out: int, opaque: bool):
        self.kind, self.target, self.args, self.kwargs, self.out = kind, target, args, kwargs, out
        self.opaque = opaque  # a module whose forward is not understood
        self.layout_free, self.steady = (
            type(target) in modules and not opaque if kind == "call_module"
            else kind == "call_function" and target in functions
            for modules, functions in ((LAYOUT_FREE, LAYOUT_FREE_FUNCTIONS), (STEADY, STEADY_FUNCTIONS)))
        self.frees: tuple[int, ...] = ()

    def __getstate__(self) -> dict:
        """Functions go by their public names: pickle cannot find F.max_pool2d by its own."""
        name = getattr(self.target, "__name__", "")
        for home in (F, torch, operator) if self.kind == "call_function" else ():
            if getattr(home, name, None) is self.target:
                return {**self.__dict__, "target": (home.__name__, name)}
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if type(self.target) is tuple:
            home, name = self.target
            self.target = getattr(importlib.import_module(home), name)

    def run(self, values: list, tidy: bool, finite: bool = True) -> Any:
        plain = not tidy or self.layout_free

        def fill(a: Slot) -> Any:
            if plain or not a.loose:
                return values[a.at]
            value = executor.restore(values[a.at])
            if self.target is collections.OrderedDict:  # it hands the tensor on: whoever else does shows the same one
                values[a.at] = value
            return value

        args, kwargs = fill_slots((self.args, self.kwargs), fill)
        if self.kind == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


class Attribute:
    """A parameter or buffer that forward reads by itself."""

    steady = opaque = False
    heeded = True

    def __init__(self, owner: nn.Module, name: str, out: int):
        self.owner, self.name, self.out = owner, name, out
        self.frees: tuple[int, ...] = ()

    def run(self, values: list, tidy: bool, finite: bool = True) -> Any:
        return getattr(self.owner, self.name)


class Launch:
    """One match: a fused launch, or its nodes one by one where the operands do not fit."""

    opaque = False
    heeded = True
    taped = True  # it may stand on a tape; what only wraps it may not

    def __init__(self, name: str, pattern: str, conv: nn.Module, norm: nn.Module | None, activation: str,
                 prologue: tuple[nn.Module, str] | None, x: int, residual: int | None, reuse: bool, pool: bool,
                 stock: list[Call], out: int):
        self.name, self.matched, self.out = name, pattern, out
        self.conv, self.norm, self.activation, self.prologue = conv, norm, activation, prologue
        self.x, self.residual, self.reuse, self.pool, self.stock = x, residual, reuse, pool, stock
        self.frees: tuple[int, ...] = ()
        self.memo = executor.Memo()
        self.backend = ""
        self.pooled = False

    @property
    def pattern(self) -> str:
        """What its backend was given at the last call: a pool runs by itself unless a kernel for both was chosen."""
        return f"{self.matched}+maxpool" if self.pooled else self.matched

    @property
    def steady(self) -> bool:
        """Whether the last result in this thread came from a kernel: those refuse weights that are not finite."""
        return executor.state.kernel

    def blocked(self) -> str | None:
        reason = executor.blocked(self.conv, self.norm, None)
        if reason is None and self.prologue is not None:
            reason = executor.norm_blocked(self.prologue[0])
        if reason is None and self.pool and self.stock[-1].kind == "call_module":
            reason = executor.pool_blocked(self.stock[-1].target)
        return reason

    def run(self, values: list, tidy: bool, finite: bool) -> Any:
        residual = None if self.residual is None else values[self.residual]
        out = executor.launch(values[self.x], self.conv, self.norm, self.activation, residual, self.prologue,
                              finite, self.reuse, self.pool, self.memo)
        self.pooled = executor.state.pooled
        if out is None:
            self.backend = "stock"
            x = values[self.x]
            if self.pool and x.dim() == 4:  # an image as it was given
                values[self.x] = x.contiguous(memory_format=torch.channels_last)
            for call in self.stock:
                out = values[call.out] = call.run(values, False)
        else:
            self.backend = backends.last()
        return out


def fill_slots(spec: Any, fill: Callable[[Slot], Any]) -> Any:
    """`spec` with every Slot replaced by `fill(slot)`."""
    if type(spec) is Slot:
        return fill(spec)
    if isinstance(spec, list):  # fx keeps its own immutable list and dict types
        return [fill_slots(s, fill) for s in spec]
    if type(spec) is tuple:
        return tuple(fill_slots(s, fill) for s in spec)
    if isinstance(spec, dict):
        return {k: fill_slots(v, fill) for k, v in spec.items()}
    if type(spec) is slice:
        return slice(*(fill_slots(s, fill) for s in (spec.start, spec.stop, spec.step)))
    return spec


class Slots:
    """Numbers for the values of a graph.

    An input has two: as the caller gave it, which whatever is not planned and the caller see, and in
    channels_last.
    """

    def __init__(self, graph: fx.Graph):
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.given = {node: i for i, node in enumerate(inputs)}
        values = [*inputs, *(n for n in graph.nodes if n.op not in ("placeholder", "output"))]
        self.number = {node: len(inputs) + i for i, node in enumerate(values)}
        self.size = len(inputs) + len(values)
        self.loose: set[fx.Node] = set(inputs)

    def free(self, node: fx.Node) -> Slot:
        """For a reader that takes any layout."""
        return Slot(self.number[node], node in self.loose)

    def exact(self, node: fx.Node) -> Slot:
        """For a reader that sees what stock would show it."""
        return Slot(self.given[node]) if node in self.given else self.free(node)


def call_step(live: Modules, node: fx.Node, slots: Slots, opaque: set[str]) -> Any:
    """The step of a node that runs as it stands."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return Attribute(live[owner], name, slots.number[node])
    target = live(node) if node.op == "call_module" else node.target
    call = Call(node.op, target, (), {}, slots.number[node], node.op == "call_module" and node.target in opaque)
    reader = slots.free if call.layout_free else slots.exact
    call.args, call.kwargs = tuple(fx.node.map_arg(node.args, reader)), dict(fx.node.map_arg(node.kwargs, reader))
    return call


def free(steps: list, output: Any) -> None:
    """Tells each step which values nobody reads after it, and whether a launch follows."""
    alive: set[int] = set()
    last = max((i for i, step in enumerate(steps) if isinstance(step, Launch)), default=-1)
    for step in steps[last + 1:]:
        step.heeded = False
    fill_slots(output, lambda a: alive.add(a.at))
    for step in reversed(steps):
        used: set[int] = set()
        if not isinstance(step, Call | Attribute):  # a launch or a branch
            used = {step.x} | ({step.residual} if step.residual is not None else set())
            used |= {c.out for c in step.stock} - {step.out}
        elif isinstance(step, Call):
            fill_slots((step.args, step.kwargs), lambda a: used.add(a.at))  # noqa: B023 - called at once
        step.frees = tuple(used - alive - {step.out})
        alive |= used
