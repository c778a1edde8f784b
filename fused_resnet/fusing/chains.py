"""Chains of ATen operators that one raw operator computes, found in the graph of an exported program.

    [norm -> activation ->] conv [-> norm] [-> + residual] [-> activation]      `_conv_bn_act`
    conv -> norm [-> activation] -> max-pool 3x3 with stride 2                  `_stem`

The graph is functional, as `ExportedProgram.run_decompositions({})` leaves it, so that values are all that there is:
a value inside of a chain is used once, by the chain.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fused_resnet.numerics import NAMES

aten = torch.ops.aten
NORMS = (aten._native_batch_norm_legit_no_training.default, aten.native_batch_norm.default)
CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding, aten.convolution.default)
ACTIVATIONS = {aten.relu.default: "relu", aten.relu6.default: "relu6", aten.silu.default: "silu",
               aten.hardswish.default: "hardswish"}


class Norm(NamedTuple):
    """A batch norm with running statistics: nodes of [C], and eps."""

    gamma: fx.Node | None
    beta: fx.Node | None
    mean: fx.Node
    var: fx.Node
    eps: float


class Conv(NamedTuple):
    """A two-dimensional convolution's operands and numbers."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass
class Chain:
    """What one launch computes, and the nodes that it stands for; the value of the last one is its result."""

    conv: Conv
    nodes: list[fx.Node]
    x: fx.Node
    norm: Norm | None = None
    residual: fx.Node | None = None
    activation: str = "identity"
    pre: Norm | None = None
    prologue: str = ""
    pooled: bool = False
    inner: list[fx.Node] = field(default_factory=list)  # of the prologue

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def gains(self) -> bool:
        """Whether more than a convolution is in it."""
        return bool(self.norm or self.residual or self.pre or self.activation != "identity")


def value(node: Any) -> Any:
    """What export recorded about the value of a node: a fake tensor, mostly."""
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names of its schema, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False))
    return {a.name: given.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in schema}


def chains(graph: fx.Graph, fits: Callable[[Chain], bool]) -> list[Chain]:
    """All chains that more than a convolution is in and that `fits` takes, whole or without what stands around."""
    found: list[Chain] = []
    taken: set[fx.Node] = set()
    convolutions = [(node, conv) for node in graph.nodes if (conv := convolution(node)) is not None]
    for node, conv in convolutions:
        chain = next((c for c in _forward(node, conv, taken) if fits(c)), None)
        if chain is not None:
            found.append(chain)
            taken.update(chain.nodes)
    for chain in found:
        _backward(chain, taken, fits)
    return [chain for chain in found if chain.gains]


def convolution(node: fx.Node) -> Conv | None:
    """`node` as a convolution of images with static numbers, or None."""
    if node.op != "call_function" or node.target not in CONVOLUTIONS:
        return None
    a = arguments(node)
    x, weight = value(a["input"]), value(a["weight"])
    if a.get("transposed") or not isinstance(x, torch.Tensor) or x.dim() != 4 or weight.dim() != 4:
        return None
    stride, dilation = _pair(a["stride"]), _pair(a["dilation"])
    padding = _padding(a["padding"], weight.shape[2:], stride, dilation)
    numbers = (*stride, *dilation, a["groups"], *weight.shape, x.shape[1], *(padding or (None,)))
    if not all(type(number) is int for number in numbers):
        return None
    return Conv(a["input"], a["weight"], a["bias"], stride, padding, dilation, a["groups"])  # type: ignore[arg-type]


def _pair(numbers: Any) -> tuple[Any, Any]:
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    return (numbers * 2)[0], (numbers * 2)[1]


def _padding(padding: Any, kernel: Any, stride: tuple, dilation: tuple) -> tuple[int, int] | None:
    """What a name of padding stands for, where it is the same on both sides."""
    if padding == "valid":
        return 0, 0
    if padding != "same":
        return _pair(padding)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return None if stride != (1, 1) or any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)


def _forward(node: fx.Node, conv: Conv, taken: set[fx.Node]) -> Iterator[Chain]:
    """The chains that begin at a convolution, the longest first."""
    chain = Chain(conv, [node], conv.x)
    found = [chain]

    def grow(user: fx.Node, **changes: Any) -> None:
        nonlocal chain
        chain = replace(chain, nodes=[*chain.nodes, user], **changes)
        found.append(chain)

    if (norm := _user(node)) is not None and (vectors := norm_of(norm, node)) and (result := _result(norm)):
        chain = replace(chain, nodes=[node, norm])
        grow(result, norm=vectors)
    if (user := _user(chain.end)) is not None and user not in taken and (other := _other(user, chain.end)):
        grow(user, residual=other)
    if (user := _user(chain.end)) is not None and (name := activation_of(user)):
        grow(user, activation=name)
    if chain.norm and not chain.residual and (user := _user(chain.end)) is not None and (pool := _pool(user)):
        grow(user, pooled=True)
        if pool is not user:
            chain.nodes.append(pool)
    yield from reversed(found)


def _backward(chain: Chain, taken: set[fx.Node], fits: Callable[[Chain], bool]) -> None:
    """Takes in the norm, and the activation, that stand in front of the convolution alone."""
    source: Any = chain.conv.x
    nodes: list[fx.Node] = []
    name = "identity"
    if chain.pooled or len(source.users) != 1:
        return
    if (found := activation_of(source)) is not None:
        name, nodes = found, [source]
        source = source.args[0]
    if source in taken or source.target is not operator.getitem or len(source.users) != 1 or source.args[1] != 0:
        return
    norm = source.args[0]
    given = norm.args[0] if isinstance(norm, fx.Node) and norm.target in NORMS else None
    if not isinstance(given, fx.Node) or norm in taken or _result(norm) is not source:
        return
    longer = replace(chain, x=given, pre=norm_of(norm, given), prologue=name, inner=[norm, source, *nodes])  # type: ignore[list-item]
    if longer.pre is not None and fits(longer):
        vars(chain).update(vars(longer))
        taken.update(longer.inner)


def _user(node: fx.Node) -> fx.Node | None:
    """The only user of a value."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _result(node: fx.Node) -> fx.Node | None:
    """The first result of a call with several, where the others are not used."""
    used = [user for user in node.users if user.users]
    first = used[0] if len(used) == 1 else None
    return first if first is not None and first.target is operator.getitem and first.args[1] == 0 else None


def norm_of(node: fx.Node, x: fx.Node) -> Norm | None:
    """`node` as a batch norm of x that keeps its dtype, with dense vectors."""
    if node.target not in NORMS or node.args[0] is not x:
        return None
    a = arguments(node)
    if a.get("training") or a["running_mean"] is None:
        return None
    vectors = a["weight"], a["bias"], a["running_mean"], a["running_var"]
    if value(node)[0].dtype != value(x).dtype or not all(v is None or dense_vector(v) for v in vectors):
        return None
    return Norm(*vectors, a["eps"])


def dense_vector(node: fx.Node) -> bool:
    v = value(node)
    return isinstance(v, torch.Tensor) and v.dim() == 1 and v.dtype in NAMES and v.is_contiguous()


def _other(node: fx.Node, end: fx.Node) -> fx.Node | None:
    """What an addition adds to `end`, where it has the shape, dtype and device of the sum."""
    if node.target is not aten.add.Tensor:
        return None
    a = arguments(node)
    other = a["other"] if a["self"] is end else a["self"]
    mine, theirs = value(end), value(other)
    if other is end or a["alpha"] != 1 or not isinstance(theirs, torch.Tensor) or theirs.dim() != 4:
        return None
    same = (mine.dtype, mine.device) == (theirs.dtype, theirs.device) and all(
        statically_known_true(a == b) for a, b in zip(mine.shape, theirs.shape, strict=True))
    return other if same else None


def activation_of(node: fx.Node) -> str | None:
    """The activation that a node applies to its first argument, or None."""
    if node.op != "call_function":
        return None
    if node.target is aten.hardtanh.default:
        a = arguments(node)
        return "relu6" if (a["min_val"], a["max_val"]) == (0, 6) else None
    return ACTIVATIONS.get(node.target)  # type: ignore[call-overload]


def _pool(node: fx.Node) -> fx.Node | None:
    """The result of a max-pool 3x3 with stride 2 and padding 1, or None."""
    if node.target not in (aten.max_pool2d.default, aten.max_pool2d_with_indices.default):
        return None
    a = arguments(node)
    numbers = tuple(_pair(a[name] or a["kernel_size"]) for name in ("kernel_size", "stride", "padding", "dilation"))
    if numbers != ((3, 3), (2, 2), (1, 1), (1, 1)) or a["ceil_mode"]:
        return None
    return node if node.target is aten.max_pool2d.default else _result(node)
