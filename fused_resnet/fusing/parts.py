"""Parts of a graph: where an inlined forward does what a convolution or a batch norm of torch.nn does.

A norm with its activation, a convolution with its norm: classes that are more than their base are traced through,
which leaves F.batch_norm and F.conv2d on tensors of one module. With that module's own settings such a call is the
module's norm or convolution, and becomes a node like any other: a call of the module, of which `meta["part"]` says
which part is meant. A batch norm that trains also counts its batches; a graph that counts any other way is no norm's.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet.fusing.effects import Refused
from fused_resnet.nn.parts import ConvPart, FrozenPart, NormPart

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_NORM = inspect.signature(F.batch_norm)
_VECTORS = ("weight", "bias", "running_mean", "running_var")


class Modules:
    """The submodules of `root`, which stay as they are meanwhile: each is looked up once."""

    def __init__(self, root: nn.Module):
        self.root = root
        self._known: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> nn.Module:
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = self.root.get_submodule(name)
        return found

    def __call__(self, node: fx.Node | None) -> Any:
        """The submodule that `node` calls, or the part of it; None where it calls none."""
        if node is None or node.op != "call_module":
            return None
        module = self[str(node.target)]
        return node.meta["part"](module) if "part" in node.meta else module


def find(graph: fx.Graph, root: nn.Module, norms: bool = True) -> None:
    """Puts calls of parts in the place of functional convolutions and norms, as `root` is now.

    Args:
        graph: of a forward of `root`.
        root: what was traced.
        norms: look for norms, too; only where the graph holds for the mode that they are in.

    Raises:
        Refused: forward checks how many dimensions a tensor has for a norm that was not found.
    """
    own = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is F.conv2d:
            _replace(node, ConvPart, _conv_of(node, root))
        elif node.op == "call_function" and node.target is F.batch_norm and norms:
            owner = _norm_of(node, root, own)
            if owner is not None:
                _drop_checks(_arguments(node)["input"])
                for count in _counts(owner, own):
                    graph.erase_node(count)  # the part does it
            _replace(node, NormPart, owner)
        elif node.target is operator.add and (frozen := _frozen_of(node, root)) is not None:
            _spell(node, *frozen)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
        elif node.meta.get("checks_rank"):
            raise Refused("forward checks dimensions for a norm that is more than F.batch_norm on its own tensors")


def _replace(node: fx.Node, part: type, owner: str | None) -> None:
    if owner is None:
        return
    x = _arguments(node)["input"]
    with node.graph.inserting_before(node):
        made = node.graph.create_node("call_module", owner, (x,), {})
    made.meta["part"] = part
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a functional convolution or norm by name, with defaults."""
    if node.target is F.batch_norm:
        bound = _NORM.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        return bound.arguments
    return {**_CONV_DEFAULTS, **dict(zip(_CONV, node.args)), **node.kwargs}


def _owner(root: nn.Module, given: dict[str, Any]) -> tuple[str, Any] | None:
    """(name, module) of the submodule whose own tensors, or lack of them, `given` are, by their names in it."""
    nodes = {name: value for name, value in given.items() if value is not None}
    if any(not isinstance(n, fx.Node) or n.op != "get_attr" or str(n.target).rpartition(".")[2] != name
           for name, n in nodes.items()):
        return None
    paths = {str(n.target).rpartition(".")[0] for n in nodes.values()}
    if len(paths) != 1:
        return None
    path, = paths
    module = root.get_submodule(path)
    known = {**module._parameters, **module._buffers}
    if any(name not in known or (known[name] is None) is not (value is None) for name, value in given.items()):
        return None
    return path, module


def _conv_of(node: fx.Node, root: nn.Module) -> str | None:
    """The name of the Conv2d subclass whose convolution this is, or None."""
    given = _arguments(node)
    found = _owner(root, {name: given.pop(name) for name in ("weight", "bias")})
    if found is None or not isinstance(found[1], nn.Conv2d) or found[1].padding_mode != "zeros":
        return None
    settings = ("stride", "padding", "dilation", "groups")
    return found[0] if all(given[name] == getattr(found[1], name) for name in settings) else None


def _norm_of(node: fx.Node, root: nn.Module, own: dict[str, fx.Node]) -> str | None:
    """The name of the BatchNorm2d subclass whose norm this is, or None."""
    given = _arguments(node)
    found = _owner(root, {name: given[name] for name in _VECTORS})
    if found is None or not isinstance(found[1], nn.BatchNorm2d):
        return None
    path, norm = found
    counts = _counts(path, own)
    expected = 1 if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None else 0
    if given["training"] is not norm.training or given["eps"] != norm.eps or len(counts) != expected:
        return None
    if any(not _adds_one(count) for count in counts) or norm.training and (
            not norm.track_running_stats or norm.momentum is None or given["momentum"] != norm.momentum):
        return None
    return path


def _counts(path: str, own: dict[str, fx.Node]) -> list[fx.Node]:
    """What reads the number of batches that a norm has seen."""
    tracked = own.get(f"{path}.num_batches_tracked")
    return [] if tracked is None else list(tracked.users)


def _adds_one(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "add_" and node.args[1:] == (1,) and not node.kwargs and (
        not node.users)


def _frozen_of(node: fx.Node, root: nn.Module) -> tuple[str, float, fx.Node, list[fx.Node]] | None:
    """(module, eps, x, nodes in the order of the graph) where a frozen norm is spelled out, or None.

    As torchvision, Hugging Face and timm write it: x * s + (bias - mean * s) with s = weight * rsqrt(var + eps).
    """
    spelled: list[fx.Node] = [node]

    def take(n: Any, *targets: Any) -> tuple:
        if not isinstance(n, fx.Node) or n.target not in targets or n.kwargs:
            raise LookupError
        spelled.append(n)
        return n.args

    def vector(n: Any) -> str:
        source, *shape = take(n, "reshape", "view")
        if shape != [1, -1, 1, 1] or source.op != "get_attr":
            raise LookupError
        return str(source.target)

    try:
        product, shift = node.args
        x, scale = take(product, operator.mul)
        weight, root_of = take(scale, operator.mul)
        inside, = take(root_of, "rsqrt", torch.rsqrt)
        var, eps = take(inside, operator.add)
        bias, moved = take(shift, operator.sub)
        mean, again = take(moved, operator.mul)
        names = [vector(n) for n in (weight, bias, mean, var)]
    except (LookupError, ValueError, AttributeError):
        return None
    path = names[0].rpartition(".")[0]
    prefix = f"{path}." if path else ""
    owner = root.get_submodule(path)
    if again is not scale or names != [prefix + name for name in _VECTORS] or type(eps) is not float or (
            not isinstance(x, fx.Node) or not set(_VECTORS) <= owner._buffers.keys()):
        return None
    return path, eps, x, spelled


def _spell(node: fx.Node, path: str, eps: float, x: fx.Node, spelled: list[fx.Node]) -> None:
    """Puts a call of the frozen norm in the place of what spells it out."""
    with node.graph.inserting_before(node):
        made = node.graph.create_node("call_module", path, (x,), {})
    made.meta["part"] = functools.partial(FrozenPart, eps=eps)
    node.replace_all_uses_with(made)
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    for n in sorted(set(spelled), key=order.__getitem__, reverse=True):
        if not n.users:
            node.graph.erase_node(n)


def _drop_checks(x: Any) -> None:
    """Takes out assertions that x has four dimensions: the part makes them."""
    for asked in list(x.users):
        reads = (asked.op == "call_function" and asked.target is builtins.getattr and asked.args[1] == "ndim"
                 or asked.op == "call_method" and asked.target == "dim")
        if not reads or not all(_checks(user) for user in asked.users):
            continue
        for compared in list(asked.users):
            for asserted in list(compared.users):
                x.graph.erase_node(asserted)
            x.graph.erase_node(compared)
        x.graph.erase_node(asked)


def _checks(node: fx.Node) -> bool:
    """Whether a comparison asks for four dimensions and nothing but an assertion reads it."""
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in ("eq", "ne") or node.args[1:] != (4,):
        return False
    if name == "ne":
        return bool(node.meta.get("checks_rank")) and not node.users
    return all(user.op == "call_function" and user.target is torch._assert and not user.users for user in node.users)
