"""Building a plan: a matched graph becomes steps over the live submodules."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fused_resnet.fusing.capture import Captured
from fused_resnet.fusing.match import Match, activation_of
from fused_resnet.fusing.plan import Plan
from fused_resnet.fusing.steps import Attribute, Call, Launch, Slot, fill_slots


class _Slots:
    """Numbers for the values of a graph.

    An input has two: as the caller gave it, which whatever is not planned and the caller see, and in
    channels_last.
    """

    def __init__(self, graph: fx.Graph):
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.given = {node: i for i, node in enumerate(inputs)}
        values = [*inputs, *(n for n in graph.nodes if n.op not in ("placeholder", "output"))]
        self.number = {node: len(inputs) + i for i, node in enumerate(values)}
        self.size = len(inputs) + len(values)
        self.loose: set[fx.Node] = set(inputs)

    def free(self, node: fx.Node) -> Slot:
        """For a reader that takes any layout."""
        return Slot(self.number[node], node in self.loose)

    def exact(self, node: fx.Node) -> Slot:
        """For a reader that sees what stock would show it."""
        return Slot(self.given[node]) if node in self.given else self.free(node)


def build(module: nn.Module, captured: Captured, matches: list[Match], opaque: set[str], keep: bool,
          prefix: str) -> Plan:
    """Turns a matched graph of `module` into a plan over its live submodules.

    Args:
        captured: what was traced; its graph is the matched one.
        opaque: names of submodules whose forwards are not understood.
        keep: leave results in channels_last.
        prefix: the name of `module` in the model, with a dot, or "".
    """
    graph = captured.graph
    slots = _Slots(graph)
    launches = {m.last: m for m in matches}
    absorbed = {n: m for m in matches for n in m.nodes}
    order = {n: i for i, n in enumerate(graph.nodes)}
    steps: list[Any] = []
    output: Any = None
    for node in graph.nodes:
        if node.op == "output":
            output = fx.node.map_arg(node.args[0], slots.exact)
        elif node in launches:
            match = launches[node]
            reuse = match.residual is not None and _expendable(match, match.residual, module, order, absorbed)
            steps.append(_launch(module, match, slots, reuse, prefix))
            slots.loose.add(node)
        elif node.op != "placeholder" and node not in absorbed:
            steps.append(_call(module, node, slots, opaque))
            if isinstance(steps[-1], Call) and steps[-1].layout_free and slots.loose.intersection(node.all_input_nodes):
                slots.loose.add(node)
    _free(steps, output)
    inlined, called = ([module.get_submodule(name) for name in names] for names in (captured.inlined, captured.called))
    given = {i for node, i in slots.given.items()
             if all(user in absorbed and absorbed[user].pool and user is absorbed[user].conv for user in node.users)}
    return Plan(module, len(slots.given), given, steps, slots.size, output, keep, inlined, called, captured.names)


def _call(module: nn.Module, node: fx.Node, slots: _Slots, opaque: set[str]) -> Any:
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return Attribute(module.get_submodule(owner), name, slots.number[node])
    target = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    call = Call(node.op, target, (), {}, slots.number[node], node.op == "call_module" and node.target in opaque)
    reader = slots.free if call.layout_free else slots.exact
    call.args, call.kwargs = tuple(fx.node.map_arg(node.args, reader)), dict(fx.node.map_arg(node.kwargs, reader))
    return call


def _launch(module: nn.Module, match: Match, slots: _Slots, reuse: bool, prefix: str) -> Launch:
    def name(node: fx.Node | None) -> str:
        return "identity" if node is None else activation_of(node, _live(module, node)) or "identity"

    prologue = None
    if match.prologue:
        prologue = (_live(module, match.prologue[0]), name(match.prologue[1] if len(match.prologue) > 1 else None))
    return Launch(f"{prefix}{match.conv.target}", match.pattern, _live(module, match.conv),
                  _live(module, match.norm), name(match.activation), prologue, slots.number[match.x],
                  None if match.residual is None else slots.number[match.residual], reuse,
                  match.pool is not None, [_call(module, n, slots, set()) for n in match.nodes],
                  slots.number[match.last])


def _live(module: nn.Module, node: fx.Node | None) -> Any:
    """The submodule that `node` calls, or None."""
    return module.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


# Modules that read a tensor and make another, keeping nothing.
_READERS = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def _expendable(match: Match, node: fx.Node, module: nn.Module, order: dict[fx.Node, int],
                absorbed: dict[fx.Node, Match]) -> bool:
    """Whether `node`, the residual of `match`, is a tensor that only this plan knows and that dies with it."""
    made = absorbed.get(node)
    if made is None and type(_live(module, node)) not in _READERS or node is match.x:
        return False

    def reads(user: fx.Node) -> bool:
        done = absorbed[user].last if user in absorbed else user
        return (order[done] <= order[match.last] and (user in absorbed or type(_live(module, user)) in _READERS))

    return (made is None or made.last is node) and all(reads(user) for user in node.users)


def _free(steps: list, output: Any) -> None:
    """Tells each step which values nobody reads after it."""
    alive: set[int] = set()
    fill_slots(output, lambda a: alive.add(a.at))
    for step in reversed(steps):
        used: set[int] = set()
        if isinstance(step, Launch):
            used = {step.x} | ({step.residual} if step.residual is not None else set())
            used |= {c.out for c in step.stock} - {step.out}
        elif isinstance(step, Call):
            fill_slots((step.args, step.kwargs), lambda a: used.add(a.at))  # noqa: B023 - called at once
        step.frees = tuple(used - alive - {step.out})
        alive |= used
