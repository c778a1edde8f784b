"""Guards of a plan: everything that tracing read from Python must still be as it was.

A graph forgets that forward looked at `self.downsample is not None` or at `self.scale`; the guards
remember. They are taken when `fuse` has attached all its plans, and travel with deep copies and pickles.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fused_resnet.nn import executor

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Guards:
    """Compares the modules behind a plan with what they were."""

    def __init__(self, root: nn.Module, inlined: list[nn.Module], called: list[nn.Module], names: set[str],
                 modes: list[tuple[nn.Module, bool]] | None = None):
        """Takes stock of everything.

        Args:
            root: the module that has the plan; its own hooks run outside of its forward.
            inlined: the modules whose forwards are in the graph, with root.
            called: the modules that the graph calls, or called before a match took them.
            names: every name that the forwards mention.
            modes: what `training` has to be, for which modules; None for False in all of them.
        """
        self.modes = [(m, False) for m in (*inlined, *called)] if modes is None else modes
        self.watched = list({id(m): m for m in (*inlined, *called)}.values())
        self.forwards = [(m, type(m).forward, m.__dict__.get("forward")) for m in self.watched]
        self.children = [(m, dict(m._modules)) for m in inlined]
        self.reads = [(m, name, copy.copy(value) if type(value) in (list, dict, set) else value)
                      for m in inlined for name, value in m.__dict__.items() if name in names and name != "training"]
        self.unset = [(values, name, values[name] is None) for m in inlined for values in (m._parameters, m._buffers)
                      for name in values]
        self.hooks = [getattr(m, hooks) for m in self.watched if m is not root for hooks in HOOKS]

    def changed(self, modes: bool = True) -> str | None:
        """What is no longer as it was, or None.

        Args:
            modes: look at `training`, too.
        """
        if any(self.hooks):
            return "a hook is registered inside"
        for module, mode in self.modes if modes else ():
            if module.training is not mode:
                return executor.TRAINING if module.training else "a module inside is in eval mode, the forward is not"
        for module, forward, own in self.forwards:
            if type(module).forward is not forward or module.__dict__.get("forward") is not own:
                return f"the forward of a {type(module).__name__} was replaced after fuse()"
        for module, then in self.children:
            if module._modules != then:
                now = module._modules
                names = sorted(str(name) for name in {*now, *then} if now.get(name) is not then.get(name))
                return f"the submodule {', '.join(names)} was replaced after fuse()"
        for module, name, then in self.reads:
            if not _same(module.__dict__.get(name), then):
                return f"the attribute {name!r} of a {type(module).__name__} was changed after fuse()"
        for values, name, missing in self.unset:
            if (values.get(name) is None) is not missing:
                return f"{name!r} was set or removed after fuse()"
        return None


def _same(now: Any, then: Any) -> bool:
    if now is then:
        return True
    return type(now) is type(then) and not isinstance(now, torch.Tensor) and _equal(now, then)


def _equal(now: Any, then: Any) -> bool:
    try:
        return bool(now == then)
    except Exception:  # whatever a foreign __eq__ raises, such as that of an array
        return False
