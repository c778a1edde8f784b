"""Matching: which convolutions of a graph become one launch with what stands around them.

    [norm -> activation ->] conv [-> norm] [-> + residual] [-> activation]
    conv -> norm -> activation -> max-pool of the family `stem`

by dataflow alone: every value inside a match is used once, whatever the classes and names around
it. What is left alone gets a reason.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet.fusing.capture import INPLACE_OPERATORS, Refused
from fused_resnet.nn import executor
from fused_resnet.nn.parts import ConvPart

ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
FUNCTIONS = {F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", "relu": "relu", "relu_": "relu",
             F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish"}
# Values of these modules are new tensors; others may hand their input on.
FRESH = (nn.Conv2d, ConvPart, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm,
         nn.Linear, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid,
         nn.Hardsigmoid, nn.Tanh, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
FRESH_FUNCTIONS = {operator.add, operator.mul, torch.add, torch.mul, torch.cat, F.relu, torch.relu, F.relu6, F.silu,
                   F.hardswish, F.conv2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.sigmoid}


@dataclass
class Match:
    """One launch: the nodes that it replaces, in order, and the values that it reads."""

    conv: fx.Node
    x: fx.Node
    norm: fx.Node | None = None
    add: fx.Node | None = None
    residual: fx.Node | None = None
    activation: fx.Node | None = None
    prologue: list[fx.Node] = field(default_factory=list)  # norm, or norm and activation
    pool: fx.Node | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        parts = (*self.prologue, self.conv, self.norm, self.add, self.activation, self.pool)
        return [node for node in parts if node is not None]

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def pattern(self) -> str:
        """The parts of the launch; the pool is one only where a kernel for it is chosen."""
        names = ["norm", "act"][:len(self.prologue)] + ["conv"]
        names += [n for n, node in (("norm", self.norm), ("add", self.add), ("act", self.activation)) if node]
        return "+".join(names)


Lookup = Callable[[fx.Node], nn.Module | None]


def activation_of(node: fx.Node, module: nn.Module | None) -> str | None:
    """The activation that this node applies to its only input, or None."""
    if len(node.args) != 1 or not isinstance(node.args[0], fx.Node) or not set(node.kwargs) <= {"inplace"}:
        return None
    if node.op == "call_module":
        return executor.ACTIVATIONS.get(type(module)) if type(module) is not nn.Identity else None
    return FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None


def drop_identities(graph: fx.Graph, lookup: Lookup, kinds: tuple = (nn.Identity, nn.Dropout, nn.Dropout2d)) -> None:
    """Takes out modules that hand their input on, by default in eval mode; the guards go on watching them."""
    for node in list(graph.nodes):
        if node.op == "call_module" and node.args and type(lookup(node)) in kinds:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def check_inplace(graph: fx.Graph, lookup: Lookup, opaque: set[str]) -> None:
    """Every in-place operation must work on a value that nobody else can see.

    So must every module in `opaque`: what a forward that is not understood does to its inputs is not known.

    Raises:
        Refused: one does not.
    """
    for node in graph.nodes:
        foreign = node.op == "call_module" and node.target in opaque
        if not foreign and not _inplace(node, lookup(node)):
            continue
        if "out" in node.kwargs:
            raise Refused("forward writes into a tensor given as out=")
        for target in node.all_input_nodes if foreign else node.args[:1]:
            if isinstance(target, fx.Node) and len(target.users) == 1 and _fresh(target, lookup):
                continue
            if foreign:
                raise Refused(f"forward shares a tensor with {node.target}, which is not understood")
            raise Refused("forward works in place on a tensor that is visible elsewhere")


def _inplace(node: fx.Node, module: nn.Module | None) -> bool:
    if node.op == "call_module":
        return bool(getattr(module, "inplace", False))
    if node.op == "call_function":
        return (node.target in INPLACE_OPERATORS or getattr(node.target, "__name__", "").endswith("_")
                or "out" in node.kwargs or bool(_argument(node, "inplace")))
    return node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")


def _argument(node: fx.Node, name: str) -> object:
    """The argument of a call that goes by `name`, however it was given; None where there is none."""
    at = _places(node.target).get(name, len(node.args))
    return node.args[at] if at < len(node.args) else node.kwargs.get(name)


@functools.lru_cache(maxsize=1024)
def _places(function: Callable) -> dict[str, int]:
    """Where a function's arguments stand, by name; none of a builtin without a signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: i for i, p in enumerate(parameters) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _fresh(node: fx.Node, lookup: Lookup) -> bool:
    """Whether this value is a tensor of its own, not its input handed on."""
    module = lookup(node)
    if _inplace(node, module):
        return True  # itself checked: it owns what it changed
    if node.op == "call_module":
        return type(module) in FRESH or executor.is_norm(module)  # type: ignore[arg-type]
    if node.op == "call_function":
        return node.target in FRESH_FUNCTIONS
    return node.op == "call_method" and node.target in ("add", "mul", "relu", "clone", "sigmoid", "mean", "sum")


def plain_leaf(module: nn.Module) -> bool:
    """A leaf of torch.nn: always a node of its own, nothing to capture."""
    return type(module).__module__.startswith("torch.nn") and not any(True for _ in module.children())


def find(graph: fx.Graph, lookup: Lookup, training: bool = False) -> tuple[list[Match], dict[fx.Node, str]]:
    """All matches in the order of their last nodes, and for each convolution left alone the reason.

    Args:
        graph: of a captured forward.
        lookup: the module that a node calls, or None.
        training: matches begin with their convolution and have no pool.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    taken: set[fx.Node] = set()
    matches, reasons = [], {}
    convs = [n for n in graph.nodes if n.op == "call_module" and isinstance(lookup(n), nn.Conv2d)]
    for conv in convs:
        module = lookup(conv)
        reason = executor.blocked(module, None, None)  # type: ignore[arg-type]
        if reason is None and not _unary(conv):
            reason = "the convolution is called with more than its input"
        if reason is not None:
            reasons[conv] = reason
            continue
        match = _grow(conv, lookup, order, taken)
        if not training:
            _prepend(match, lookup, taken)
            _append(match, lookup)
        if len(match.nodes) == 1:
            reasons[conv] = _lonely(conv, lookup)
            continue
        taken.update(match.nodes)
        matches.append(match)
    return sorted(matches, key=lambda m: order[m.last]), reasons


def _unary(node: fx.Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _grow(conv: fx.Node, lookup: Lookup, order: dict[fx.Node, int], taken: set[fx.Node]) -> Match:
    match = Match(conv, conv.args[0])  # type: ignore[arg-type]
    tail = conv
    user = _only_user(tail)
    norm = lookup(user) if user is not None else None
    if user is not None and norm is not None and executor.is_norm(norm) and _unary(user) and user not in taken:
        match.norm = tail = user
        user = _only_user(tail)
    if user is not None and user not in taken and _plain_add(user, tail):
        a, b = user.args[:2]
        other = b if a is tail else a
        # Two convolutions meet in a projection: the one that is computed first leaves the add to the second
        # unless it is the left operand, which owns the sum.
        if a is tail or not _growing(other, lookup, taken):
            match.add, match.residual, tail = user, other, user  # type: ignore[assignment]
            user = _only_user(tail)
    if user is not None and user not in taken and activation_of(user, lookup(user)):
        match.activation = user
    return match


def _plain_add(node: fx.Node, tail: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or node.target not in ADDS or node.kwargs or len(node.args) != 2:
        return False
    a, b = node.args
    return isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b and tail in (a, b)


def _growing(node: object, lookup: Lookup, taken: set[fx.Node]) -> bool:
    """Whether `node` ends a conv or conv + norm that could take the add itself."""
    if not isinstance(node, fx.Node) or node in taken or len(node.users) != 1 or node.op != "call_module":
        return False
    module = lookup(node)
    if module is not None and executor.is_norm(module) and _unary(node):
        conv: fx.Node = node.args[0]  # type: ignore[assignment]
        module = lookup(conv) if len(conv.users) == 1 else None
    return type(module) in executor.CONVS


def _prepend(match: Match, lookup: Lookup, taken: set[fx.Node]) -> None:
    """Takes a norm (and activation) that only this convolution reads, unless another conv's epilogue has it."""
    node, activation = match.x, None
    if not isinstance(node, fx.Node) or node in taken or len(node.users) != 1:
        return
    if activation_of(node, lookup(node)) is not None:
        activation, node = node, node.args[0]  # type: ignore[assignment]
    module = lookup(node)
    if node in taken or len(node.users) != 1 or module is None or not executor.is_norm(module) or not _unary(node):
        return
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    if type(lookup(source)) in executor.CONVS and len(source.users) == 1:
        return
    match.prologue = [node] if activation is None else [node, activation]
    match.x = source


def _append(match: Match, lookup: Lookup) -> None:
    """Takes the max-pool behind conv, norm and activation, if it is the one that the family `stem` computes."""
    pool = _only_user(match.last)
    if pool is not None and len(match.nodes) == 3 and match.norm and match.activation and _stem_pool(pool, lookup):
        match.pool = pool


def _stem_pool(node: fx.Node, lookup: Lookup) -> bool:
    module = lookup(node)
    if module is not None:
        return _unary(node) and executor.pool_blocked(module) is None
    return (node.op == "call_function" and node.target is F.max_pool2d  # which traces its input as args[0]
            and executor.pooling_blocked(*node.args[1:], **node.kwargs) is None)


def _lonely(conv: fx.Node, lookup: Lookup) -> str:
    if len(conv.users) > 1:
        return "the convolution's output is used more than once"
    user = _only_user(conv)
    if user is None or user.op == "output":
        return "nothing follows the convolution"
    module = lookup(user)
    name = type(module).__name__ if module is not None else getattr(user.target, "__name__", str(user.target))
    return f"{name} follows the convolution: no norm, add or activation that can be fused"
