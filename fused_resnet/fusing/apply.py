"""fuse, unfuse, refresh: plans are attached to modules and taken off again; nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from fused_resnet import backends, tuner
from fused_resnet.fusing import match
from fused_resnet.fusing.capture import REPLACED, Refused, shadow
from fused_resnet.fusing.plan import Plan, detach
from fused_resnet.fusing.reading import Reader

NOTES = "_fused_resnet_notes"
Model = TypeVar("Model", bound=nn.Module)
SCRIPTABLE = "__prepare_scriptable__"  # TorchScript asks for it before it reads a module
NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class Notes:
    """What `fuse` found out, kept on the root for `report`."""

    convs: dict[str, str] = field(default_factory=dict)  # name of a convolution -> why it was left alone
    modules: dict[str, str] = field(default_factory=dict)  # name of a module -> why it has no plan


class Scriptable:
    """Gives TorchScript the stock module: a copy of the modules without plans that shares all tensors."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self) -> nn.Module:
        twins: dict[nn.Module, nn.Module] = {}
        for module in self.module.modules():
            twins[module] = twin = type(module).__new__(type(module))
            twin.__dict__.update(module.__dict__)
            unplan(twin)
        for module, twin in twins.items():
            twin.__dict__["_modules"] = {name: child and twins[child] for name, child in module._modules.items()}
        return twins[self.module]


def fuse(model: Model, *, inplace: bool = False, filter: Callable[[str, nn.Module], bool] | None = None,
         strict: bool = False, memory_format: torch.memory_format | None = None,
         tune: bool | float = False, recompute: bool | None = None) -> Model:
    """Gives every module whose forward is understood a plan that runs convolution + norm + add + activation at once.

    Modules, classes, parameters and state-dict keys stay; only how `forward` is carried out changes: in
    inference as fused launches, in training as residual branches with gradients. See `report` for what was
    fused and why the rest was not.

    Args:
        model: any module; its convolutions may be anywhere inside.
        inplace: attach to `model` itself; default is a deep copy.
        filter: `filter(qualified_name, module)`; modules for which it is False stay stock, with all inside them.
        strict: raise if any convolution is left alone.
        memory_format: torch.channels_last gives results in channels_last memory. By default they
            have the strides that the stock model gives.
        tune: measure every kernel that can run a problem when the model first meets it, on its real operands and
            without gradients, and keep the fastest for this user and device: `tuner.SECONDS` for each problem, or as
            many seconds as given. The first calls take that long; later processes find the rows. `fused-resnet tune`
            does the same ahead, with more time.
        recompute: in training save little for backward (a bit for each element of a block's output, the inner
            convolutions' outputs) and make the rest again. False saves what stock saves. None trains on the stock
            modules unless launches of ours are the choice; on a GPU these recompute.

    Returns:
        The fused model.

    Raises:
        ValueError: `model` is no module that can be fused, an unknown memory_format, a negative time, or, with
            strict, the list of what was skipped.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"fuse() takes an nn.Module that is not scripted, got {type(model).__name__}")
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format must be torch.channels_last or None, got {memory_format}")
    if tune < 0:
        raise ValueError(f"tune must be a bool or seconds, got {tune}")
    with _uncollected():
        fused = unfuse(model if inplace else copy.deepcopy(model))
        notes = Notes()
        _attach(fused, filter, memory_format is torch.channels_last, notes)
        fused.__dict__[NOTES] = notes
        attached = plans(fused)
        for module in fused.modules():
            if any(isinstance(inner.__dict__.get("forward"), Plan) for inner in module.modules()):
                module.__dict__[SCRIPTABLE] = Scriptable(module)
        for plan in attached.values():
            plan.arm()
            plan.recompute = recompute
            plan.tune = tuner.SECONDS if tune is True else float(tune)
    if strict:
        from fused_resnet.fusing.report import report

        skipped = [row for row in report(fused) if row.status != "fused"]
        if skipped:
            raise ValueError("not everything could be fused:\n" + "\n".join(f"  {r.name}: {r.reason}" for r in skipped))
    return fused


def unfuse(model: Model) -> Model:
    """Takes every plan off `model` (in place) and returns it: the stock model with the same parameters."""
    for module in model.modules():
        unplan(module)
    model.__dict__.pop(NOTES, None)
    return model


def unplan(module: nn.Module) -> None:
    """Takes off what `fuse` has attached to this module alone."""
    detach(module).__dict__.pop(SCRIPTABLE, None)


def refresh(model: nn.Module) -> int:
    """Drops packed and folded weights after writes that PyTorch cannot see (`.data.copy_`, numpy).

    Returns:
        How many were dropped; they are made afresh at the next call.
    """
    return backends.forget([*model.parameters(), *model.buffers()])


def plans(model: nn.Module) -> dict[str, Plan]:
    """The plans attached in `model`, outermost first, by the name of their module."""
    found = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    return {name: plan for name, plan in found.items() if isinstance(plan, Plan)}


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pauses Python's collector: over graphs, which are all cycles, it takes longer than making them does."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _attach(model: nn.Module, allowed: Callable[[str, nn.Module], bool] | None, keep: bool, notes: Notes) -> None:
    try:
        reader = Reader(shadow(model))
    except Exception as error:  # whatever a user's __deepcopy__ raises
        notes.modules[""] = f"the model cannot be copied for tracing: {error}"
        return
    opaque: set[str] = set()
    if allowed is not None:
        opaque = {name for name, module in model.named_modules() if not allowed(name, module)}
        notes.modules.update((name, "left out by the filter") for name in opaque)
    modules = dict(model.named_modules())
    replaced = {name for name, module in modules.items() if "forward" in module.__dict__}
    notes.modules.update((name, REPLACED) for name in replaced)
    left_out = tuple(f"{name}." for name in opaque)
    opaque |= replaced
    for name, module in reversed(modules.items()):  # children before parents
        if name in opaque or name.startswith(left_out) or type(module) in NEVER_CALLED or match.plain_leaf(module):
            continue
        prefix = f"{name}." if name else ""
        inside = {other[len(prefix):] for other in opaque if other.startswith(prefix)}
        try:
            reading = reader.read(name, inside)
        except Refused as refusal:
            notes.modules[name] = str(refusal)
            opaque.add(name)
            continue
        notes.convs.update((f"{prefix}{conv}", reason) for conv, reason in reading.why.items())
        plan = reading.plan(module, keep, prefix)
        if plan is not None:
            plan.attach()
