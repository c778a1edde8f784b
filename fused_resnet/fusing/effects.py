"""Effects: what a forward's bytecode does that a graph of its tensors would forget.

Attributes set, containers written, calls made for their effect, context managers, type tests, chance: a function with
any of them is refused. What stays inside of one call is no effect: a list or dict that the function itself made and
holds in a local name alone may be written. Nor is what a graph records: `torch._assert`, and methods of a module's
own parameters and buffers, which are tracing tensors, and methods that work in place on a tensor in a local name.

To know what a store or a call works on, straight lines of bytecode are followed with a stack of what is known about
each value. Whatever is not known, an opcode of another Python included, counts as foreign.
"""

from __future__ import annotations

import builtins
import collections
import dis
import functools
import inspect
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class Refused(Exception):
    """This forward cannot be captured; the message says why."""


_EFFECTS = {
    "STORE_ATTR": "sets an attribute", "DELETE_ATTR": "deletes an attribute", "STORE_SUBSCR": "writes into a container",
    "DELETE_SUBSCR": "deletes from a container", "STORE_GLOBAL": "sets a global", "STORE_SLICE": "writes into a slice",
    "BEFORE_WITH": "uses a context manager", "SETUP_WITH": "uses a context manager",
    "LOAD_SPECIAL": "uses a context manager", "SETUP_FINALLY": "handles exceptions",
    "PUSH_EXC_INFO": "handles exceptions", "YIELD_VALUE": "is a generator"}
_TESTS = {"isinstance", "issubclass", "type"}
_CALLS = {"print", "setattr", "delattr", "exec", "eval", "open", "input", "next", "pop", "popitem", "setdefault",
          "update"}
_CHANCE = {"random", "rand", "randn", "randint", "time", "perf_counter"}

_FOREIGN = ("foreign", None)
_MAKERS = (list, dict, set, collections.OrderedDict)
_HOMES = (torch, collections)
_KNOWN = (*_MAKERS, *_HOMES, torch._assert)
_GROWERS = {"append", "extend", "insert"}
_LOCALS = {"LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_FAST_LOAD_FAST",
           "LOAD_FAST_BORROW_LOAD_FAST_BORROW"}
_LOADS = {"LOAD_CONST", "LOAD_SMALL_INT", "LOAD_DEREF", "PUSH_NULL"}
_ONE_RESULT = {"BINARY_OP", "BINARY_SUBSCR", "COMPARE_OP", "IS_OP", "CONTAINS_OP", "UNARY_NOT", "UNARY_NEGATIVE",
               "BUILD_TUPLE", "BUILD_STRING", "BUILD_SLICE", "FORMAT_VALUE", "CALL", "CALL_KW"}
_DISPLAYS = {"BUILD_LIST", "BUILD_MAP", "BUILD_SET", "BUILD_CONST_KEY_MAP"}
_NOTHING = {"NOP", "RESUME", "CACHE", "EXTENDED_ARG", "KW_NAMES", "COPY_FREE_VARS", "MAKE_CELL"}


@dataclass
class _Lines:
    """What is known about the values on the stack, along straight lines of bytecode: (kind, more about it).

    Kinds: "local" name, "own" attribute's name, "object" itself, "method" (owner, name), "called" the same, "fresh",
    "recorded", "foreign".
    """

    known: dict[str, Any]  # the globals that matter
    receiver: str | None  # the name that stands for the module
    stack: list[tuple] = field(default_factory=list)  # below it nothing is known
    stores: dict[str, list[tuple]] = field(default_factory=dict)  # what local names were given

    def step(self, at: dis.Instruction) -> list[tuple]:
        """Follows one instruction; the values that it took, the deepest first."""
        if at.is_jump_target:
            self.stack.clear()
        name, taken = at.opname, []
        if name in _LOCALS:
            self.stack += [("local", n) for n in _names(at)]
        elif name.startswith("STORE_FAST"):
            self.store(at)
        elif name in ("LOAD_GLOBAL", "LOAD_NAME"):
            self.stack += [("object", self.known.get(at.argval))] * _effect(at)  # a NULL may stand beside it
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            taken = self.take(1)
            self.stack += [self.attribute(taken[0], at.argval)] * (1 + _effect(at))
        elif name in _LOADS:
            self.stack += [_FOREIGN] * _effect(at)
        elif name in _DISPLAYS or name in _ONE_RESULT:
            taken = self.take(1 - _effect(at))
            self.stack.append(("fresh", None) if name in _DISPLAYS else
                              _result(taken) if name.startswith("CALL") else _FOREIGN)
        elif name == "COPY":
            self.stack.append(self.stack[-at.arg] if len(self.stack) >= at.arg else _FOREIGN)  # type: ignore
        elif name in ("PRECALL", "POP_TOP", "STORE_SUBSCR"):  # in 3.11 PRECALL takes a call's arguments
            taken = self.take(-_effect(at))
        elif name not in _NOTHING:
            self.stack.clear()
        return taken

    def take(self, count: int) -> list[tuple]:
        found = [self.stack.pop() if self.stack else _FOREIGN for _ in range(count)]
        return found[::-1]

    def store(self, at: dis.Instruction) -> None:
        names = _names(at)
        loads = names[1:] if at.opname == "STORE_FAST_LOAD_FAST" else []
        for name in names[:len(names) - len(loads)]:
            self.stores.setdefault(name, []).append(*self.take(1))
        self.stack += [("local", name) for name in loads]

    def attribute(self, owner: tuple, name: str) -> tuple:
        kind, what = owner
        if kind == "object" and any(what is home for home in _HOMES):
            return ("object", getattr(what, name, None))
        if kind == "local" and what == self.receiver:
            return ("own", name)
        return ("method", (owner, name))


def _names(at: dis.Instruction) -> list[str]:
    return list(at.argval) if isinstance(at.argval, tuple) else [at.argval]


def _effect(at: dis.Instruction) -> int:
    return dis.stack_effect(at.opcode, at.arg, jump=False)


def _result(taken: list[tuple]) -> tuple:
    """What is known about a call's result from what it took: the callee stands first or second."""
    for kind, what in taken[:2]:
        if kind == "object" and any(what is maker for maker in _MAKERS):
            return ("fresh", None)
        if kind == "object" and what is torch._assert:
            return ("recorded", None)
        if kind == "method":
            return ("called", what)
    return _FOREIGN


def scan(code: types.CodeType, scope: dict[str, Any], owners: list[Any]) -> set[str]:
    """Every name that `code` mentions, the code of its inner functions included.

    Args:
        code: of a function that runs in a forward.
        scope: its globals.
        owners: what it ran for as a method, if it did.

    Raises:
        Refused: it does something that a graph would forget.
    """
    found = ((name, scope.get(name, getattr(builtins, name, None))) for name in _mentioned(code))
    known = tuple((name, value) for name, value in found if any(value is k for k in _KNOWN))
    tensors = frozenset.intersection(*map(_tensors, owners)) if owners else None
    reason, names = _scan(code, known, tensors)
    if reason is not None:
        raise Refused(reason)
    return set(names)


@functools.lru_cache(maxsize=4096)
def _mentioned(code: types.CodeType) -> frozenset[str]:
    return frozenset(code.co_names).union(*map(_mentioned, _inner(code)))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


@functools.lru_cache(maxsize=4096)  # a network has few forwards and many blocks
def _scan(code: types.CodeType, known: tuple, tensors: frozenset[str] | None) -> tuple[str | None, frozenset[str]]:
    """(what `code` does that a graph would forget or None, all names that it mentions).

    Args:
        code: of a function.
        known: (name, value) of the globals that matter.
        tensors: names of the module's parameters and buffers where `code` ran as its method, else None.
    """
    names = _mentioned(code).union(c for c in code.co_consts if isinstance(c, str))  # getattr(self, "name")
    for words, does in ((_TESTS, "tests types"), (_CALLS, "calls"), (_CHANCE, "depends on chance or time:")):
        if found := sorted(words.intersection(code.co_names)):
            return f"{code.co_name} {does}" + ("" if words is _TESTS else f" {', '.join(found)}"), names
    arguments = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
                                 + bool(code.co_flags & inspect.CO_VARKEYWORDS)]
    lines = _Lines(dict(known), arguments[0] if tensors is not None and arguments else None)
    steps = [(at, lines.step(at)) for at in dis.get_instructions(code)]
    local = {name for name, values in lines.stores.items()
             if name not in arguments and all(kind == "fresh" for kind, _ in values)}
    if tensors is None or lines.receiver in lines.stores:
        tensors = frozenset()
    before = ""
    for at, taken in steps:
        reason = _reason(at, taken, before, local, tensors)
        if reason is not None:
            return f"{code.co_name} {reason}", names
        before = at.opname
    for constant in _inner(code):
        reason, inner = _scan(constant, known, None)
        names |= inner
        if reason is not None:
            return reason, names
    return None, names


def _reason(at: dis.Instruction, taken: list[tuple], before: str, local: set[str],
            tensors: frozenset[str]) -> str | None:
    """The effect of an instruction that a graph would forget, or None.

    Args:
        at: the instruction.
        taken: the values that it took.
        before: the opcode in front of it.
        local: names that only ever stand for containers which this function made.
        tensors: names of the module's parameters and buffers.
    """
    if at.opname == "STORE_SUBSCR" and taken[1][0] == "local" and taken[1][1] in local:
        return None
    if at.opname in ("LOAD_ATTR", "LOAD_METHOD") and at.argval in _GROWERS:
        (kind, name), = taken
        return None if kind == "fresh" or kind == "local" and name in local else "calls something for its effect"
    if at.opname == "POP_TOP" and before.startswith("CALL"):
        kind, what = taken[0]
        if kind == "recorded":
            return None
        if kind == "called":
            (owner, name), method = what
            if owner == "local" and (name in local and method in _GROWERS or _writes_tensor(method)):
                return None
            if owner == "own" and name in tensors:
                return None
        return "calls something for its effect"
    return _EFFECTS.get(at.opname)


def _writes_tensor(method: str) -> bool:
    """Whether a method works in place on a tensor: a graph records that, and who else reads the tensor is looked at.

    Of an object that is no tensor such a method is Python code, which is read like any other.
    """
    return method.endswith("_") and not method.endswith("__") and hasattr(torch.Tensor, method)


def _tensors(owner: Any) -> frozenset[str]:
    """The names of a module's own parameters and buffers that are not None: tracing makes proxies of them."""
    if not isinstance(owner, nn.Module):
        return frozenset()
    return frozenset(name for values in (owner._parameters, owner._buffers) for name, t in values.items()
                     if t is not None)
