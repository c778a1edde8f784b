"""Capture: the forward of one module as a dataflow graph, or the reason why it cannot be one.

Tracing runs on a copy that shares parameters and has no hooks. A graph records what forward does
with tensors and forgets everything else, so a forward that does anything else is refused: its
bytecode is read first (`fusing.effects`), and the tracing tensors refuse to be asked for their type
or their data.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.fusing.effects import Refused, scan
from fused_resnet.fusing.guards import HOOKS
from fused_resnet.nn import executor

REPLACED = "forward was replaced on the instance"

INPLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
                     operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift,
                     operator.irshift}
_PARTS = ("torch.nn.modules.conv", "torch.nn.modules.batchnorm")
_DECORATED = {"decorate_context", "decorate_autocast"}  # how torch names what its context managers make of functions


@dataclass
class Captured:
    """The forward of one module as a graph, and what it was read from."""

    graph: fx.Graph  # as it was traced
    inlined: list[str]  # submodules whose forwards are in the graph
    called: list[str]  # submodules that the graph calls
    names: set[str]  # every name that the forwards mention
    modes: tuple[bool, ...]  # `training` of the module and of those inside

    @functools.cached_property
    def arity(self) -> int:
        """How many tensors it takes."""
        return sum(node.op == "placeholder" for node in self.graph.nodes)

    @functools.cached_property
    def result(self) -> fx.Node | None:
        """What it returns, if that is one tensor."""
        found = self.graph.output_node().args[0]
        return found if isinstance(found, fx.Node) else None


Known = Callable[[str, nn.Module], Captured | None]  # what was captured of a submodule, if it holds now


class _Proxy(fx.Proxy):
    """A tracing tensor that keeps `+=` apart from `+` and refuses to be asked for its type."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker == "torch" or asker.startswith(("torch.", "fused_resnet.")):
            return _Proxy
        raise Refused("forward tests the type of a tensor")


def _inplace(operation: Callable) -> Callable:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _operation in INPLACE_OPERATORS:
    setattr(_Proxy, f"__{_operation.__name__}__", _inplace(_operation))


class _NoTensors(TorchDispatchMode):
    """While tracing nothing may compute: its result would be a constant of the graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Refused(f"forward computes with tensors of its own ({func})")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, opaque: set[str], known: Known | None):
        super().__init__()
        self.opaque, self.known = opaque, known
        self.inlined: list[str] = []
        self.mentioned: set[str] = set()  # in forwards that were captured before
        self.names: dict[int, str] = {}
        self.read: dict[str, fx.Proxy] = {}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        """A proxy for each parameter and buffer; fx looks their names up by walking the whole model at every read."""
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        if not self.names:
            self.names = {id(t): name for values in (self.root.named_buffers(), self.root.named_parameters())
                          for name, t in values}
        name = self.names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in self.read:
            self.read[name] = self.create_proxy("get_attr", name, (), {})
        return self.read[name]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The norms of torch.nn ask whether their input has four dimensions: as in `torch._assert`, it has."""
        if sys._getframe(2).f_code is nn.BatchNorm2d._check_input_dim.__code__:
            obj.node.meta["checks_rank"] = True
            return False
        return super().to_bool(obj)

    def create_arg(self, a: Any) -> Any:
        """fx takes every dict for a plain one; results are to have the type that stock gives them."""
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):
            if type(a) is not collections.OrderedDict:
                raise Refused(f"forward passes a {type(a).__name__} on")
            return self.create_proxy("call_function", collections.OrderedDict, (list(a.items()),), {}).node
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (module_qualified_name in self.opaque or executor.is_norm(m)
                or super().is_leaf_module(m, module_qualified_name))

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        name = self.path_of_module(m)
        if not self.is_leaf_module(m, name):
            # Tensors alone tell nothing more about a call than the placeholders of its own capture.
            if self.known is not None and not kwargs and all(type(a) is _Proxy for a in args):
                captured = self.known(name, m)
                if captured is not None and captured.arity == len(args) and captured.result is not None:
                    return self.insert(name, captured, args)
            examine(m)
            self.inlined.append(name)
        return super().call_module(m, forward, args, kwargs)

    def insert(self, name: str, captured: Captured, args: tuple[fx.Proxy, ...]) -> fx.Proxy:
        """The graph of a submodule in the place of its call: what tracing its forward once more would give."""
        self.inlined += [f"{name}.{inner}" if inner else name for inner in captured.inlined]
        self.mentioned |= captured.names
        given = iter(args)
        values: dict[fx.Node, fx.Proxy] = {}
        for node in captured.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                target = f"{name}.{node.target}"
                if target not in self.read:
                    self.read[target] = self.copied(node, target, values)
                values[node] = self.read[target]
            elif node.op != "output":
                values[node] = self.copied(node, f"{name}.{node.target}" if node.op == "call_module" else node.target,
                                           values)
        return values[captured.result]  # type: ignore[index]

    def copied(self, node: fx.Node, target: Any, values: dict[fx.Node, fx.Proxy]) -> fx.Proxy:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n].node)
        made = self.graph.create_node(node.op, target, args, kwargs, node.name)
        made.meta.update((key, node.meta[key]) for key in ("checks_rank",) if key in node.meta)
        return self.proxy(made)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        args: list[Any] = [self.root]
        for p in list(inspect.signature(root_fn).parameters.values())[1:]:
            if p.kind is p.VAR_POSITIONAL or (p.kind is p.KEYWORD_ONLY and p.default is p.empty):
                raise Refused(f"forward takes {p}")
            if p.kind in (p.VAR_KEYWORD, p.KEYWORD_ONLY):
                continue
            args.append(self.create_proxy("placeholder", p.name, (), {}) if p.default is p.empty else p.default)
        return root_fn, args


def shadow(model: nn.Module) -> nn.Module:
    """A copy to trace: same structure in eval mode, parameters and buffers shared, hooks left out."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for hooks in HOOKS:
            getattr(module, hooks).clear()
    return twin.eval()


def capture(module: nn.Module, opaque: set[str], known: Known | None = None) -> Captured:
    """Traces `module`, a part of a `shadow`.

    Args:
        module: what to trace.
        opaque: names of submodules, relative to `module`, that are to stay calls.
        known: what was captured of a submodule with the same submodules opaque: it is not traced again.

    Raises:
        Refused: with the reason.
    """
    examine(module)
    tracer = _Tracer(opaque, known)
    try:
        with torch.no_grad(), _NoTensors(), _watching() as names:
            graph = tracer.trace(module)
    except Refused:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(f"forward is more than dataflow: {first[:120]}") from error
    for node in graph.nodes:
        if node.op == "get_attr" and not isinstance(_attribute(module, node.target), torch.Tensor):
            raise Refused(f"forward reads {node.target}, which is no tensor")
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            raise Refused("forward uses a tensor that is neither parameter nor buffer")
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    return Captured(graph, ["", *tracer.inlined], called, names | tracer.mentioned,
                    tuple(m.training for m in module.modules()))


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def examine(module: nn.Module) -> None:
    """Reads the bytecode of a module's forward.

    Raises:
        Refused: it does something that a graph would forget.
    """
    if "forward" in module.__dict__:
        raise Refused(REPLACED)
    if any(isinstance(value, torch.Tensor) for value in module.__dict__.values()):
        raise Refused("keeps a tensor that is neither parameter nor buffer")
    forward = inspect.unwrap(type(module).forward)
    if not _ours(type(module).__module__) and isinstance(forward, types.FunctionType):
        scan(forward.__code__, forward.__globals__, [module])


def _ours(module: str) -> bool:
    """Whether a Python module is PyTorch, this package or the standard library: code that is known."""
    root = module.split(".")[0]
    return root in ("torch", "fused_resnet") or root in sys.stdlib_module_names


@contextlib.contextmanager
def _watching() -> Iterator[set[str]]:
    """Examines every foreign function that runs inside: helpers, methods, decorators.

    Yields:
        What is filled at the end: every name that those functions mention.

    Raises:
        Refused: at the end, if one of them does something that a graph would forget.
    """
    seen: dict[types.CodeType, dict[str, Any]] = {}
    owners: dict[types.CodeType, dict[int, Any]] = {}
    decorated: list[str] = []
    names: set[str] = set()

    def watch(frame: types.FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in seen:
            seen[code] = frame.f_globals
            home = frame.f_globals.get("__name__") or "torch"
            if not _ours(home) or home.startswith(_PARTS):
                owners[code] = {}
        if code in owners and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            owners[code][id(first)] = first
        if code.co_name in _DECORATED:
            decorated.append(getattr(frame.f_locals.get("func"), "__module__", None) or "torch")

    # A running profiler (cProfile) cannot be put back from Python: leave it be and listen as a debugger does.
    listen = sys.setprofile if sys.getprofile() is None else sys.settrace
    before: Any = None if listen is sys.setprofile else sys.gettrace()
    listen(watch)
    try:
        yield names
    finally:
        listen(before)
    if not all(map(_ours, decorated)):
        raise Refused("forward uses a context manager")
    for code, ran in owners.items():
        if not _ours(seen[code].get("__name__") or "torch"):
            names |= scan(code, seen[code], list(ran.values()))
        elif any(isinstance(m, nn.Module) for m in ran.values()):
            names |= set(code.co_names)  # a foreign class whose forward is, or calls, its base's
