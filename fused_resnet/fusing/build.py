"""Building a plan: a matched graph becomes steps over the live submodules."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fused_resnet.fusing import head
from fused_resnet.fusing.capture import Captured
from fused_resnet.fusing.match import Match, activation_of
from fused_resnet.fusing.parts import Modules
from fused_resnet.fusing.plan import Plan
from fused_resnet.fusing.steps import Call, Launch, Slots, call_step, free
from fused_resnet.nn.parts import ConvPart, NormPart


def build(live: Modules, captured: Captured, graph: fx.Graph, matches: list[Match], opaque: set[str], keep: bool,
          prefix: str) -> Plan:
    """Turns a matched graph into a plan over live submodules.

    Args:
        live: the module that gets the plan, and those inside.
        captured: what was traced.
        graph: its graph, matched.
        matches: of the graph.
        opaque: names of submodules whose forwards are not understood.
        keep: leave results in channels_last.
        prefix: the name of the module in the model, with a dot, or "".
    """
    slots = Slots(graph)
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
            reuse = match.residual is not None and _expendable(match, match.residual, live, order, absorbed)
            steps.append(_launch(live, match, slots, reuse, prefix))
            slots.loose.add(node)
        elif node.op != "placeholder" and node not in absorbed:
            step = call_step(live, node, slots, opaque)
            steps.append(head.better(step) if isinstance(step, Call) else step)
            if isinstance(steps[-1], Call) and steps[-1].layout_free and slots.loose.intersection(node.all_input_nodes):
                slots.loose.add(node)
    free(steps, output)
    inlined, called = ([live[name] for name in names] for names in (captured.inlined, captured.called))
    given = {i for node, i in slots.given.items()
             if all(user in absorbed and absorbed[user].pool and user is absorbed[user].conv for user in node.users)}
    return Plan(live.root, len(slots.given), given, head.joined(steps), slots.size, output, keep, inlined, called,
                captured.names)


def _launch(live: Modules, match: Match, slots: Slots, reuse: bool, prefix: str) -> Launch:
    def name(node: fx.Node | None) -> str:
        return "identity" if node is None else activation_of(node, live(node)) or "identity"

    prologue = None
    if match.prologue:
        prologue = (live(match.prologue[0]), name(match.prologue[1] if len(match.prologue) > 1 else None))
    return Launch(f"{prefix}{match.conv.target}", match.pattern, live(match.conv),
                  live(match.norm), name(match.activation), prologue, slots.number[match.x],
                  None if match.residual is None else slots.number[match.residual], reuse,
                  match.pool is not None, [call_step(live, n, slots, set()) for n in match.nodes],
                  slots.number[match.last])


# Modules that read a tensor and make another, keeping nothing.
_READERS = (nn.Conv2d, nn.BatchNorm2d, ConvPart, NormPart, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def _expendable(match: Match, node: fx.Node, live: Modules, order: dict[fx.Node, int],
                absorbed: dict[fx.Node, Match]) -> bool:
    """Whether `node`, the residual of `match`, is a tensor that only this plan knows and that dies with it."""
    made = absorbed.get(node)
    if made is None and type(live(node)) not in _READERS or node is match.x:
        return False

    def reads(user: fx.Node) -> bool:
        done = absorbed[user].last if user in absorbed else user
        return (order[done] <= order[match.last] and (user in absorbed or type(live(user)) in _READERS))

    return (made is None or made.last is node) and all(reads(user) for user in node.users)
