"""fuse, unfuse, refresh: plans are attached to modules and taken off again; nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import fx, nn

from fused_resnet import backends, tuner
from fused_resnet.fusing import match, parts
from fused_resnet.fusing.build import build
from fused_resnet.fusing.capture import REPLACED, Captured, Refused, capture, shadow
from fused_resnet.fusing.plan import NO_ROUTE, Plan, detach
from fused_resnet.fusing.route import Route

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
    fused = unfuse(model if inplace else copy.deepcopy(model))
    notes = Notes()
    _attach(fused, filter, memory_format is torch.channels_last, notes)
    fused.__dict__[NOTES] = notes
    for module in fused.modules():
        if plans(module):
            module.__dict__[SCRIPTABLE] = Scriptable(module)
    for plan in plans(fused).values():
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


def _attach(model: nn.Module, allowed: Callable[[str, nn.Module], bool] | None, keep: bool, notes: Notes) -> None:
    try:
        twin = shadow(model)
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
            plan, reasons = _plan(module, twin.get_submodule(name), inside, keep, prefix)
        except Refused as refusal:
            notes.modules[name] = str(refusal)
            opaque.add(name)
            continue
        notes.convs.update((f"{prefix}{conv}", reason) for conv, reason in reasons.items())
        if plan is not None:
            plan.attach()


def _plan(module: nn.Module, twin: nn.Module, opaque: set[str], keep: bool,
          prefix: str) -> tuple[Plan | None, dict[str, str]]:
    captured = capture(twin, opaque)
    graph = captured.graph
    spare = _copy(graph)

    def lookup(node: fx.Node) -> nn.Module | None:
        return parts.called(twin, node)

    parts.find(graph, twin)
    match.drop_identities(graph, lookup)
    foreign = {name for name in opaque if not match.plain_leaf(twin.get_submodule(name))
               or "forward" in twin.get_submodule(name).__dict__}
    match.check_inplace(graph, lookup, foreign)
    found, reasons = match.find(graph, lookup)
    why = {str(conv.target): reason for conv, reason in reasons.items()}
    whole = {name: twin.get_submodule(name) for name in captured.inlined}
    why.update((name, f"the forward of a {type(m).__name__} is more than a convolution with its own weight")
               for name, m in whole.items() if isinstance(m, nn.Conv2d)
               and name not in why and name not in {str(made.conv.target) for made in found})
    if not found or not any(node.op == "placeholder" for node in graph.nodes):
        return None, why
    plan = build(module, captured, found, foreign, keep, prefix)
    reads = "training" in captured.names
    route = _route(module, twin, captured, spare, lookup, foreign, prefix, False if reads else None)
    plan.routes = {False: route, True: route}
    if reads:
        twin.train()
        try:
            captured = capture(twin, opaque)
            plan.routes[True] = _route(module, twin, captured, captured.graph, lookup, foreign, prefix, True)
        except Refused as refusal:
            plan.routes[True] = f"in training: {refusal}"
        finally:
            twin.eval()
    return plan, why


def _route(module: nn.Module, twin: nn.Module, captured: Captured, graph: fx.Graph, lookup: match.Lookup,
           opaque: set[str], prefix: str, mode: bool | None) -> Route | str:
    try:
        parts.find(graph, twin, norms=mode is not None)
        route = Route(module, captured, graph, lookup, opaque, prefix, mode)
    except Refused as refusal:
        return f"in training: {refusal}"
    return route if route.branches else NO_ROUTE


def _copy(graph: fx.Graph) -> fx.Graph:
    twin = fx.Graph()
    twin.output(twin.graph_copy(graph, {}))
    return twin
