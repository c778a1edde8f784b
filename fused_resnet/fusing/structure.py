"""Structure: which modules of a model are made alike, so that one reading of their forward holds for all of them.

Two modules are alike if everything that a forward could find in them is equal, all the way down: classes, attributes,
shapes and dtypes of parameters and buffers, children by name. Whatever is of a kind that cannot be compared so makes
its module unlike any other, and each module around it.
"""

from __future__ import annotations

import collections
import enum
import types
from typing import Any

import torch
from torch import nn

_PLAIN = {int, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_EXACT = {float, complex}  # whose repr() keeps what == forgets: the sign of zero, NaN
_ROWS = {tuple, list, torch.Size, set, frozenset}
_TABLES = {dict, collections.OrderedDict}
_ITSELF = (type, types.FunctionType, types.BuiltinFunctionType, enum.Enum)  # alike if they are the same object
_OWN = frozenset(vars(nn.Module()))  # attributes of every module: its tables, which are read by themselves, and hooks


class _Unlike(Exception):
    """Something here cannot be compared."""


class Structures:
    """Numbers for the modules of one model, equal for modules that are made alike.

    Args:
        root: the model, of which no module changes afterwards but for `training`.
    """

    def __init__(self, root: nn.Module):
        self._kinds: dict[tuple, int] = {}  # what a module is made like -> its number
        self._numbers: dict[int, int | None] = {}
        seen: set[int] = set()
        self._shared: set[int] = set()  # modules with two names, tensors with two owners
        for _, module in root.named_modules(remove_duplicate=False):
            tensors = () if id(module) in seen else (*module._parameters.values(), *module._buffers.values())
            for part in (module, *tensors):
                if part is not None:
                    (self._shared if id(part) in seen else seen).add(id(part))
        steady = all(_steady(module) for module in root.modules())
        self._number(root, steady)

    def number(self, module: nn.Module) -> int | None:
        """The number of a module of the model; None if it is like no other."""
        return self._numbers.get(id(module))

    def _number(self, module: nn.Module, steady: bool) -> int | None:
        """Numbers `module` and everything inside; without `steady` nothing is like anything."""
        if id(module) not in self._numbers:
            children = [(name, child and self._number(child, steady)) for name, child in module._modules.items()]
            try:
                if not steady or id(module) in self._shared or any(number is None and module._modules[name] is not None
                                                                   for name, number in children):
                    raise _Unlike
                kind = (id(type(module)), tuple(children), *self._own(module))
                self._numbers[id(module)] = self._kinds.setdefault(kind, len(self._kinds))
            except (_Unlike, RecursionError):
                self._numbers[id(module)] = None
        return self._numbers[id(module)]

    def _own(self, module: nn.Module) -> tuple:
        """What a module holds beside its children."""
        values = tuple([(name, _value(v)) for name, v in module.__dict__.items() if name not in _OWN])
        tensors = [tuple([(name, None if t is None else self._tensor(t)) for name, t in table.items()])
                   for table in (module._parameters, module._buffers)]
        return values, *tensors

    def _tensor(self, t: torch.Tensor) -> tuple:
        if type(t) not in (torch.Tensor, nn.Parameter) or id(t) in self._shared or vars(t):
            raise _Unlike
        return type(t), t.shape, t.dtype, t.device, t.layout, t.requires_grad


def _value(v: Any) -> tuple:
    """An attribute as something that is equal for equal attributes alone."""
    kind = type(v)
    if kind in _PLAIN:
        return kind, v
    if kind in _EXACT:
        return kind, repr(v)
    if kind in _ROWS:
        return kind, tuple([_value(item) for item in v])
    if kind in _TABLES:
        return kind, tuple([(_value(name), _value(item)) for name, item in v.items()])
    if isinstance(v, _ITSELF):
        return kind, id(v)
    raise _Unlike


def _steady(module: nn.Module) -> bool:
    """Whether `train()` and `eval()` change nothing but `training` in a module, and all its attributes can be seen."""
    kind = type(module)
    return (kind.train is nn.Module.train and kind.eval is nn.Module.eval
            and not {"train", "eval"} & vars(module).keys() and not any(vars(c).get("__slots__") for c in kind.__mro__))
