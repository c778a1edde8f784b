"""The plan: what `fuse` attaches to a module, and how it runs.

A plan is the captured forward as a list of steps over numbered values. It holds the live
submodules, so deep copies, pickles, moved and reloaded parameters need no care. Every call first
asks the guards; when one fails, the class's own forward runs. The first call of each kind also runs
the stock forward and compares values and strides: a plan that disagrees is dropped.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet import backends, numerics
from fused_resnet.fusing.match import ADDS, FUNCTIONS, Match, activation_of
from fused_resnet.nn import executor

# Between planned modules values are channels_last. These steps do not care; any other gets the strides of stock.
LAYOUT_FREE = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.Linear,
               nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
LAYOUT_FREE_FUNCTIONS = {*(f for f in FUNCTIONS if callable(f)), *(f for f in ADDS if callable(f)), operator.mul, torch.mul,
                         torch.cat, torch.flatten, torch.sigmoid, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
                         F.hardsigmoid}
# How far a plan may be from stock before it is taken for wrong: rounding of a deep network stays far
# below, a dropped or misplaced operation lands near 1.
PLAN_TOLERANCE = {"fp64": 1e-6, "fp32": 1e-2, "bf16": 0.2, "fp16": 0.2}


class Slot(NamedTuple):
    """A numbered value of the plan, where an argument stands."""

    index: int


class Call:
    """One node that runs as it stands."""

    def __init__(self, kind: str, target: Any, args: tuple, kwargs: dict, out: int, layout_free: bool):
        self.kind, self.target, self.args, self.kwargs, self.out = kind, target, args, kwargs, out
        self.layout_free = layout_free
        self.frees: tuple[int, ...] = ()

    def run(self, values: list, tidy: bool, finite: bool = True) -> Any:
        def fill(a: Any) -> Any:
            value = values[a.index]
            return value if self.layout_free or not tidy else executor.restore(value)

        args, kwargs = _map((self.args, self.kwargs), fill)
        if self.kind == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


class Attribute:
    """A parameter or buffer that forward reads by itself."""

    def __init__(self, owner: nn.Module, name: str, out: int):
        self.owner, self.name, self.out = owner, name, out
        self.frees: tuple[int, ...] = ()

    def run(self, values: list, tidy: bool, finite: bool) -> Any:
        return getattr(self.owner, self.name)


class Launch:
    """One match: a fused launch, or its nodes one by one where the operands do not fit."""

    def __init__(self, name: str, pattern: str, conv: nn.Module, norm: nn.Module | None, activation: str,
                 prologue: tuple[nn.Module, str] | None, x: int, residual: int | None, reuse: bool, stock: list[Call],
                 out: int):
        self.name, self.pattern, self.out = name, pattern, out
        self.conv, self.norm, self.activation, self.prologue = conv, norm, activation, prologue
        self.x, self.residual, self.reuse, self.stock = x, residual, reuse, stock
        self.frees: tuple[int, ...] = ()
        self.backend = ""

    def blocked(self) -> str | None:
        reason = executor.blocked(self.conv, self.norm, None)
        return reason if reason or self.prologue is None else executor.norm_blocked(self.prologue[0])

    def run(self, values: list, tidy: bool, finite: bool) -> Any:
        residual = None if self.residual is None else values[self.residual]
        out = executor.launch(values[self.x], self.conv, self.norm, self.activation, residual, self.prologue,
                              finite, self.reuse)
        if out is None:
            self.backend = "stock"
            for call in self.stock:
                out = values[call.out] = call.run(values, False)
        return out


class Plan:
    """Callable in the place of `module.forward`."""

    def __init__(self, module: nn.Module, inputs: list[str], steps: list, size: int, output: Any,
                 watched: list[nn.Module], keep: bool):
        self.module, self.inputs, self.steps, self.size, self.output = module, inputs, steps, size, output
        self.watched = watched  # every module whose hooks, mode and place matter
        self.keep = keep  # leave results in channels_last
        self.launches = [s for s in steps if isinstance(s, Launch)]
        self.checked: set[tuple] = set()
        self.broken: str | None = None
        self.fallbacks: dict[str, int] = {}
        self._guards: tuple | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_guards": None}

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> Any:  # torch.export asks where forward stands
        return inspect.unwrap(type(self.module).forward).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        if torch.compiler.is_compiling() or executor.state.stock:
            return forward(self.module, *args, **kwargs)
        reason = self.refusal(args, kwargs)
        if reason is not None:
            self._note(reason)
            return forward(self.module, *args, **kwargs)
        convert = self._converts(args)
        key = (args[0].device.type, args[0].dtype, convert, torch.is_autocast_enabled(args[0].device.type))
        if key not in self.checked:
            return self._check(key, args, convert)
        return self._run(args, convert)

    def refusal(self, args: tuple, kwargs: dict) -> str | None:
        """Why the plan cannot answer this call, or None: the guards."""
        if self.broken is not None:
            return self.broken
        if kwargs or len(args) != len(self.inputs):
            return "called with other arguments than the plan was made for"
        reason = executor.ambient(args, self.module.parameters)
        if reason is not None:
            return reason
        if self._guards is None:
            self._guards = self._make_guards()
        places, hooks = self._guards
        if any(hooks):
            return "a hook is registered inside"
        for children, name, child in places:
            if children.get(name) is not child:
                return f"the submodule {name!r} was replaced after fuse()"
        for module in self.watched:
            if module.training:
                return executor.TRAINING
        for launch in self.launches:
            reason = launch.blocked()
            if reason is not None:
                return f"{launch.name}: {reason}"
        for x in args:
            if not x.is_floating_point() or x.numel() and x.is_cpu and not backends.all_finite(x):
                return "the input is not finite floating point"
        return None

    def _make_guards(self) -> tuple:
        inside = {id(m) for m in self.watched}
        places = [(parent._modules, name, child) for parent in self.watched
                  for name, child in parent._modules.items() if child is not None and id(child) in inside]
        hooks = [h for m in self.watched if m is not self.module
                 for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)]
        return places, hooks

    def _converts(self, args: tuple) -> bool:
        """Whether stock would compute in contiguous memory here, so that results must be put back into it."""
        return (not any(executor.suggests_channels_last(x) for x in args)
                and not any(executor.suggests_channels_last(s.conv._parameters["weight"]) for s in self.launches))

    def _run(self, args: tuple, convert: bool, record: bool = False) -> Any:
        values: list[Any] = [None] * self.size
        values[:len(args)] = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and (convert or self.keep)
                              else x for x in args]
        tidy = convert and not self.keep
        profiled = torch.autograd._profiler_enabled()
        finite = True
        for step in self.steps:
            if profiled and type(step) is Launch:
                with torch.profiler.record_function(f"fused_resnet::{step.name}"):
                    values[step.out] = step.run(values, tidy, finite)
            elif record and type(step) is Launch:
                values[step.out] = step.run(values, tidy, finite)
                step.backend = step.backend or backends.last()
            else:
                value = values[step.out] = step.run(values, tidy, finite)
                if type(step) is Call and not step.layout_free and finite and type(value) is torch.Tensor and value.is_cpu:
                    finite = not value.is_floating_point() or backends.all_finite(value)
            for slot in step.frees:
                values[slot] = None
        return _map(self.output, lambda a: executor.restore(values[a.index]) if tidy else values[a.index])

    def _check(self, key: tuple, args: tuple, convert: bool) -> Any:
        if args[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return self._run(args, convert)
        executor.state.stock = True
        try:
            inputs = args if not self.keep else tuple(
                x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in args)
            expected = type(self.module).forward(self.module, *inputs)
        finally:
            executor.state.stock = False
        result = self._run(args, convert, record=True)
        problem = _difference(result, expected)
        if problem is None:
            self.checked.add(key)
            return result
        self.broken = f"the plan disagreed with the stock forward: {problem}"
        warnings.warn(f"fused_resnet leaves a {type(self.module).__name__} stock: {self.broken}. Please report this line "
                      f"with the source of its forward.", stacklevel=4)
        return expected

    def _note(self, reason: str) -> None:
        if reason not in self.fallbacks and reason in (executor.GRAD, executor.TRAINING):
            _warn_once(reason)
        self.fallbacks[reason] = self.fallbacks.get(reason, 0) + 1


_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"fused_resnet: {reason}. Use model.eval() and torch.no_grad() or torch.inference_mode() for "
                      f"fused inference.", stacklevel=5)


def _difference(result: Any, expected: Any) -> str | None:
    """What is wrong with `result`, or None."""
    mine, theirs = torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(expected)
    if len(mine) != len(theirs) or type(result) is not type(expected):
        return f"a {type(result).__name__} of {len(mine)} values in place of a {type(expected).__name__} of {len(theirs)}"
    for a, b in zip(mine, theirs, strict=True):
        if not isinstance(b, torch.Tensor):
            if a != b:
                return f"{a!r} in place of {b!r}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
            return (f"shape {tuple(a.shape)}, strides {a.stride()}, {a.dtype} in place of {tuple(b.shape)}, "
                    f"{b.stride()}, {b.dtype}")
        if b.numel() and b.is_floating_point():
            error = numerics.measure(a, b)
            if error.rel > PLAN_TOLERANCE.get(numerics.NAMES.get(b.dtype, ""), 0.2):
                return f"relative rms error {error.rel:.2g}"
    return None


def _map(spec: Any, fill: Any) -> Any:
    """`spec` with every Slot replaced by `fill(slot)`."""
    if type(spec) is Slot:
        return fill(spec)
    if isinstance(spec, list):  # fx keeps its own immutable list and dict types
        return [_map(s, fill) for s in spec]
    if type(spec) is tuple:
        return tuple(_map(s, fill) for s in spec)
    if isinstance(spec, dict):
        return {k: _map(v, fill) for k, v in spec.items()}
    if type(spec) is slice:
        return slice(*(_map(s, fill) for s in (spec.start, spec.stop, spec.step)))
    return spec


def build(module: nn.Module, graph: fx.Graph, matches: list[Match], inlined: list[str], keep: bool, prefix: str) -> Plan:
    """Turns a matched graph of `module` into a plan over its live submodules.

    Args:
        inlined: names of the submodules whose forwards are in the graph.
        keep: leave results in channels_last.
        prefix: the name of `module` in the model, with a dot, or "".
    """
    slots: dict[fx.Node, int] = {}
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for node in [*inputs, *(n for n in graph.nodes if n.op not in ("placeholder", "output"))]:
        slots[node] = len(slots)
    launches = {m.last: m for m in matches}
    absorbed = {n: m for m in matches for n in m.nodes}
    order = {n: i for i, n in enumerate(graph.nodes)}
    steps: list[Any] = []
    output: Any = None
    for node in graph.nodes:
        if node.op == "output":
            output = fx.node.map_arg(node.args[0], lambda n: Slot(slots[n]))
        elif node in launches:
            match = launches[node]
            reuse = match.residual is not None and _expendable(match, order, absorbed, lambda n: _live(module, n))
            steps.append(_launch(module, match, slots, reuse, prefix))
        elif node.op != "placeholder" and node not in absorbed:
            steps.append(_call(module, node, slots))
    _free(steps, output, len(inputs))
    leaves = [n.target for n in graph.nodes if n.op == "call_module"]
    watched = {id(m): m for m in (module, *(module.get_submodule(n) for n in (*inlined, *leaves)))}
    for launch in steps:
        for call in launch.stock if isinstance(launch, Launch) else ():
            if call.kind == "call_module":
                watched[id(call.target)] = call.target
    return Plan(module, [n.target for n in inputs], steps, len(slots), output, list(watched.values()), keep)


def _call(module: nn.Module, node: fx.Node, slots: dict[fx.Node, int]) -> Any:
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return Attribute(module.get_submodule(owner), name, slots[node])
    target = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    args = fx.node.map_arg(node.args, lambda n: Slot(slots[n]))
    kwargs = fx.node.map_arg(node.kwargs, lambda n: Slot(slots[n]))
    free = (type(target) in LAYOUT_FREE if node.op == "call_module"
            else node.op == "call_function" and target in LAYOUT_FREE_FUNCTIONS)
    return Call(node.op, target, tuple(args), dict(kwargs), slots[node], free)


def _launch(module: nn.Module, match: Match, slots: dict[fx.Node, int], reuse: bool, prefix: str) -> Launch:
    def name(node: fx.Node | None) -> str:
        return "identity" if node is None else activation_of(node, _live(module, node)) or "identity"

    prologue = None
    if match.prologue:
        prologue = (_live(module, match.prologue[0]), name(match.prologue[1] if len(match.prologue) > 1 else None))
    return Launch(f"{prefix}{match.conv.target}", match.pattern, _live(module, match.conv),  # type: ignore
                  _live(module, match.norm), name(match.activation), prologue, slots[match.x],
                  None if match.residual is None else slots[match.residual], reuse,
                  [_call(module, n, slots) for n in match.nodes], slots[match.last])


def _live(module: nn.Module, node: fx.Node | None) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


# Modules that read a tensor and make another, keeping nothing.
_READERS = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def _expendable(match: Match, order: dict[fx.Node, int], absorbed: dict[fx.Node, Match],
                live: Callable[[fx.Node], nn.Module | None]) -> bool:
    """Whether the residual of `match` is a tensor that only this plan knows and that dies with it."""
    node = match.residual
    made = absorbed.get(node)
    if made is None and not (node.op == "call_module" and type(live(node)) in _READERS) or node is match.x:
        return False

    def reads(user: fx.Node) -> bool:
        done = absorbed[user].last if user in absorbed else user
        return (order[done] <= order[match.last] and (user in absorbed or type(live(user)) in _READERS))

    return (made is None or made.last is node) and all(reads(user) for user in node.users)


def _free(steps: list, output: Any, inputs: int) -> None:
    """Tells each step which values nobody reads after it."""
    alive: set[int] = set()
    _map(output, lambda a: alive.add(a.index))
    for step in reversed(steps):
        used: set[int] = set()
        if isinstance(step, Launch):
            used = {step.x} | ({step.residual} if step.residual is not None else set())
            used |= {c.out for c in step.stock} - {step.out}
        elif isinstance(step, Call):
            _map((step.args, step.kwargs), lambda a, used=used: used.add(a.index))
        step.frees = tuple(used - alive - {step.out})
        alive |= used
