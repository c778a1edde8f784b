"""Routes: what a plan runs where gradients are recorded or norms look at the batch.

A route comes from the same capture as the plan, or from a second one in training mode where forward reads
`self.training`. Its convolutions and norms run as residual branches (`ops.residual_branch`), each one autograd
node: chains whose inner values nobody else reads, with the projection or the tensor that is added at their end.
Everything else stays a call of the live module.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fused_resnet.fusing import match
from fused_resnet.fusing.capture import Captured
from fused_resnet.fusing.guards import Guards
from fused_resnet.fusing.parts import Modules
from fused_resnet.fusing.steps import Call, Slots, call_step, fill_slots, free
from fused_resnet.nn import executor, training
from fused_resnet.nn.training import Unit

NO_ROUTE = "in training: no convolution is followed by a batch norm"
LONGEST = 3  # stages of a branch: backward holds all their activations at once


@dataclass
class Chain:
    """Matches that become one branch: those of the main path in order, and the projection's."""

    main: list[match.Match]
    projection: match.Match | None = None

    @property
    def matches(self) -> list[match.Match]:
        return [*self.main, *([self.projection] if self.projection is not None else [])]


@dataclass
class Sketch:
    """What a route is made from: it holds for all modules that are made alike."""

    captured: Captured
    graph: fx.Graph
    chains: list[Chain]
    mode: bool | None  # what forward found in `self.training`; None where it did not look


class BranchStep:
    """A chain: one branch, or its nodes one by one where the operands do not fit."""

    opaque = steady = False

    def __init__(self, name: str, units: list[Unit], projection: Unit | None, x: int, residual: int | None,
                 stock: list[Call], out: int):
        self.name, self.units, self.projection = name, units, projection
        self.x, self.residual, self.stock, self.out = x, residual, stock, out
        self.frees: tuple[int, ...] = ()

    def blocked(self) -> str | None:
        """Why no branch can be made of the modules as they are, or None."""
        for unit in (*self.units, *([self.projection] if self.projection is not None else [])):
            reason = training.blocked(unit)
            if reason is not None:
                return reason
        return None

    def run(self, values: list, tidy: bool, recompute: bool | None) -> Any:
        if self.blocked() is None:
            shortcut = None if self.residual is None else values[self.residual]
            out = training.run(values[self.x], self.units, shortcut, self.projection, recompute)
            if out is not None:
                return out
        for call in self.stock:
            out = values[call.out] = call.run(values, tidy)
        return out


class Route:
    """The forward of one module as steps."""

    def __init__(self, live: Modules, made: Sketch, opaque: set[str], prefix: str):
        """Builds the steps.

        Args:
            live: the live module, and those inside.
            made: of this module or of one that is made alike.
            opaque: names of submodules whose forwards are not understood.
            prefix: the name of the module in the model, with a dot, or "".
        """
        self.module, self.mode, self.names = live.root, made.mode, made.captured.names
        self.inlined, self.called = ([live[n] for n in names] for names in (made.captured.inlined,
                                                                            made.captured.called))
        self._build(live, made.graph, made.chains, opaque, prefix)
        self.opaque = [s.target for s in self.steps if s.opaque]

    def arm(self) -> None:
        """Takes the guards, once every plan of the model is attached."""
        self.guards = Guards(self.module, self.inlined, self.called, self.names,
                             [] if self.mode is None else [(m, self.mode) for m in self.inlined])

    def _build(self, live: Modules, graph: fx.Graph, found: list[Chain], opaque: set[str], prefix: str) -> None:
        slots = Slots(graph)
        ends = {chain.main[-1].last: chain for chain in found}
        absorbed = {node for chain in found for m in chain.matches for node in m.nodes}
        order = {node: i for i, node in enumerate(graph.nodes)}
        self.steps: list[Any] = []
        self.output: Any = None
        for node in graph.nodes:
            if node.op == "output":
                self.output = fx.node.map_arg(node.args[0], slots.exact)
            elif node in ends:
                self.steps.append(_step(live, ends[node], slots, order, prefix))
                slots.loose.add(node)
            elif node.op != "placeholder" and node not in absorbed:
                step = call_step(live, node, slots, opaque)
                self.steps.append(step)
                if isinstance(step, Call) and step.layout_free and slots.loose.intersection(node.all_input_nodes):
                    slots.loose.add(node)
        free(self.steps, self.output)
        self.size, self.arity = slots.size, len(slots.given)

    def refusal(self, args: tuple, kwargs: dict) -> str | None:
        """Why the route cannot answer this call, or None."""
        if kwargs or len(args) != self.arity:
            return "called with other arguments than the plan was made for"
        if self.module._is_full_backward_hook is False:
            return executor.OLD_HOOKS
        reason = executor.ambient(args, None) or self.guards.changed()
        if reason is not None:
            return reason
        for x in args:
            if not x.is_floating_point() or not x.numel():
                return "the input is empty or no floating point"
        return None

    def run(self, args: tuple, tidy: bool, recompute: bool | None, answers: dict[int, list] | None = None) -> Any:
        """The module's answer.

        Args:
            args: the inputs.
            tidy: put what branches answered in channels_last back into contiguous memory where code that is not
                planned, or the caller, would see it.
            recompute: see `nn.training.run`.
            answers: of opaque modules that have been called already.
        """
        values = [*args, *args, *[None] * (self.size - 2 * len(args))]
        for step in self.steps:
            if answers and step.opaque:
                values[step.out] = answers[id(step.target)].pop(0)
            elif isinstance(step, BranchStep):
                with torch.profiler.record_function(f"fused_resnet::{step.name}"):
                    values[step.out] = step.run(values, tidy, recompute)
            else:
                values[step.out] = step.run(values, tidy)
            for slot in step.frees:
                values[slot] = None
        return fill_slots(self.output, lambda slot: executor.restore(values[slot.at]) if tidy and slot.loose
                          else values[slot.at])


def sketch(captured: Captured, graph: fx.Graph, lookup: match.Lookup, opaque: set[str],
           mode: bool | None) -> Sketch | str:
    """What a route is made from, or why there is none.

    Args:
        captured: what was traced.
        graph: its graph, as it was traced; it is changed.
        lookup: the module that a node calls, or None.
        opaque: names of submodules whose forwards are not understood.
        mode: what forward found in `self.training`; None where it did not look.

    Raises:
        Refused: forward works in place on what it does not own.
    """
    match.drop_identities(graph, lookup, (nn.Identity,))
    match.check_inplace(graph, lookup, opaque)
    found, _ = match.find(graph, lookup, training=True)
    grouped = chains(graph, found, lookup)
    return Sketch(captured, graph, grouped, mode) if grouped else NO_ROUTE


def chains(graph: fx.Graph, found: list[match.Match], lookup: match.Lookup) -> list[Chain]:
    """Groups matches: each is followed by the one that alone reads its result, and takes the projection at its end."""
    # Branches run where their last node stands: statistics of a norm with two places would move in another order.
    places = collections.Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    able = {m.last: m for m in found if m.norm is not None and places[str(m.norm.target)] == 1 and not m.prologue
            and _activation(m, lookup) is not None}
    taken: set[int] = set()
    made: list[Chain] = []
    for end in reversed(list(able.values())):
        if id(end) in taken:
            continue
        chain = Chain([end])
        taken.add(id(end))
        before = able.get(end.residual) if end.residual is not None else None
        if before is not None and id(before) not in taken and _inner(before) and before.activation is None:
            chain.projection = before
            taken.add(id(before))
        while len(chain.main) < LONGEST:
            before = able.get(chain.main[0].x)
            if before is None or id(before) in taken or not _inner(before):
                break
            chain.main.insert(0, before)
            taken.add(id(before))
        made.append(chain)
    return made


def _inner(m: match.Match) -> bool:
    """Whether nobody but one reader sees the result, and nothing is added to it."""
    return m.add is None and len(m.last.users) == 1


def _activation(m: match.Match, lookup: match.Lookup) -> str | None:
    """The name of the match's activation if its gradient can be told from its output, or None."""
    name = "identity" if m.activation is None else match.activation_of(m.activation, lookup(m.activation))
    return name if name in training.ACTIVATIONS else None


def _step(live: Modules, chain: Chain, slots: Slots, order: dict[fx.Node, int], prefix: str) -> BranchStep:
    def unit(m: match.Match) -> Unit:
        name = "identity" if m.activation is None else match.activation_of(m.activation, live(m.activation))
        return Unit(live(m.conv), live(m.norm), name or "identity")

    end = chain.main[-1]
    nodes = sorted((node for m in chain.matches for node in m.nodes), key=order.__getitem__)
    residual = chain.projection.x if chain.projection is not None else end.residual
    return BranchStep(f"{prefix}{chain.main[0].conv.target}", [unit(m) for m in chain.main],
                      None if chain.projection is None else unit(chain.projection), slots.number[chain.main[0].x],
                      None if residual is None else slots.number[residual],
                      [call_step(live, node, slots, set()) for node in nodes], slots.number[end.last])
