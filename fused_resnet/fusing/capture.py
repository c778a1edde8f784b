"""Capture: the forward of one module as a dataflow graph, or the reason why it cannot be one.

Tracing runs on a copy that shares parameters and has no hooks. A graph records what forward does
with tensors and forgets everything else, so a forward that does anything else is refused: its
bytecode is read first (attributes set, containers written, calls made for their effect, context
managers, type tests), and the tracing tensors refuse to be asked for their type or their data.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import inspect
import operator
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from fused_resnet.nn import executor


class Refused(Exception):
    """This forward cannot be captured; the message says why."""


_EFFECTS = {
    "STORE_ATTR": "sets an attribute", "DELETE_ATTR": "deletes an attribute", "STORE_SUBSCR": "writes into a container",
    "DELETE_SUBSCR": "deletes from a container", "STORE_GLOBAL": "sets a global", "STORE_SLICE": "writes into a slice",
    "BEFORE_WITH": "uses a context manager", "SETUP_WITH": "uses a context manager",
    "SETUP_FINALLY": "handles exceptions", "PUSH_EXC_INFO": "handles exceptions", "YIELD_VALUE": "is a generator"}
_TESTS = {"isinstance", "issubclass", "type"}
_CALLS = {"print", "setattr", "delattr", "exec", "eval", "open", "input"}


class _Proxy(fx.Proxy):
    """A tracing tensor that keeps `+=` apart from `+` and refuses to be asked for its type."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    @property
    def __class__(self) -> type:  # type: ignore[override]
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if asker == "torch" or asker.startswith(("torch.", "fused_resnet.")):
            return _Proxy
        raise Refused("forward tests the type of a tensor")


class _Tracer(fx.Tracer):
    def __init__(self, opaque: set[str]):
        super().__init__()
        self.opaque = opaque
        self.inlined: list[str] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (module_qualified_name in self.opaque or executor.is_norm(m)
                or super().is_leaf_module(m, module_qualified_name))

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        name = self.path_of_module(m)
        if not self.is_leaf_module(m, name):
            examine(m)
            self.inlined.append(name)
        return super().call_module(m, forward, args, kwargs)

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
    """A copy to trace: same structure in eval mode, parameters and buffers shared, hooks and plans left out."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        module.__dict__.pop("forward", None)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
    return twin.eval()


def capture(module: nn.Module, opaque: set[str]) -> tuple[fx.Graph, list[str]]:
    """Traces `module`, a part of a `shadow`.

    Args:
        module: what to trace.
        opaque: names of submodules, relative to `module`, that are to stay calls.

    Returns:
        The graph and the names of the submodules whose forwards were inlined into it.

    Raises:
        Refused: with the reason.
    """
    examine(module)
    tracer = _Tracer(opaque)
    try:
        with _watching():
            graph = tracer.trace(module)
    except Refused:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(f"forward is more than dataflow: {first[:120]}") from error
    for node in graph.nodes:
        if node.op == "get_attr" and not isinstance(_attribute(module, node.target), torch.Tensor):
            raise Refused(f"forward reads {node.target}, which is no tensor")
    return graph, tracer.inlined


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
        raise Refused("forward was replaced on the instance")
    forward = inspect.unwrap(type(module).forward)
    if not _ours(type(module).__module__) and isinstance(forward, types.FunctionType):
        _scan(forward.__code__)


def _ours(module: str) -> bool:
    """Whether a Python module is PyTorch, this package or the standard library: code that is known."""
    root = module.split(".")[0]
    return root in ("torch", "fused_resnet") or root in sys.stdlib_module_names


@contextlib.contextmanager
def _watching() -> Iterator[None]:
    """Examines every foreign function that runs inside: helpers, methods, decorators.

    Raises:
        Refused: at the end, if one of them does something that a graph would forget.
    """
    seen: dict[types.CodeType, str] = {}

    def watch(frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code not in seen:
            seen[frame.f_code] = frame.f_globals.get("__name__") or "torch"

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)
    for code, module in seen.items():
        if not _ours(module):
            _scan(code)


def _scan(code: types.CodeType) -> None:
    names = set(code.co_names)
    if names & _TESTS:
        raise Refused(f"{code.co_name} tests types")
    if names & _CALLS:
        raise Refused(f"{code.co_name} calls {', '.join(sorted(names & _CALLS))}")
    before = ""
    for step in dis.get_instructions(code):
        reason = _EFFECTS.get(step.opname)
        if reason is None and step.opname == "LOAD_SPECIAL":
            reason = "uses a context manager"
        if reason is None and step.opname == "POP_TOP" and before.startswith("CALL"):
            reason = "calls something for its effect"
        if reason is not None:
            raise Refused(f"{code.co_name} {reason}")
        before = step.opname
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _scan(constant)
