"""Reading: what the forward of one module comes to, told by the names of its submodules alone.

A network has many blocks and few that differ. What was found in one holds for all that are made alike
(`fusing.structure`), and what was read of a part stands in the graph of the whole, where it is called.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from fused_resnet.fusing import match, parts, route
from fused_resnet.fusing.build import build
from fused_resnet.fusing.capture import Captured, Refused, capture
from fused_resnet.fusing.plan import Plan
from fused_resnet.fusing.structure import Structures


@dataclass
class Reading:
    """The forward of a module and of every other that is made alike."""

    captured: Captured  # as it was traced
    foreign: set[str]  # submodules whose forwards are not understood
    why: dict[str, str]  # name of a convolution -> why it is left alone
    graph: fx.Graph  # matched
    matches: list[match.Match]
    routes: dict[bool, route.Sketch | str]
    training: Captured | None = None  # where forward reads `training`

    def plan(self, module: nn.Module, keep: bool, prefix: str) -> Plan | None:
        """A plan for one of those modules, or None if nothing was found in it; see `build`."""
        if not self.matches:
            return None
        live = parts.Modules(module)
        plan = build(live, self.captured, self.graph, self.matches, self.foreign, keep, prefix)
        made = {id(sketch): sketch if isinstance(sketch, str) else route.Route(live, sketch, self.foreign, prefix)
                for sketch in self.routes.values()}
        plan.routes = {mode: made[id(sketch)] for mode, sketch in self.routes.items()}
        return plan


class Reader:
    """Reads the modules of a model, children before parents.

    Args:
        twin: a `shadow` of the model.
    """

    def __init__(self, twin: nn.Module):
        self.modules = dict(twin.named_modules())
        self.structures = Structures(twin)
        self.readings: dict[str, Reading] = {}
        self.alike: dict[tuple, Reading | str] = {}  # str: why it was refused

    def read(self, name: str, opaque: set[str]) -> Reading:
        """Reads one module.

        Args:
            name: of the module.
            opaque: names of submodules, relative to it, that are to stay calls.

        Raises:
            Refused: with the reason.
        """
        module = self.modules[name]
        number = self.structures.number(module)
        key = number, _modes(module), frozenset(opaque)
        found = None if number is None else self.alike.get(key)
        if found is None:
            try:
                found = self._read(name, module, opaque)
            except Refused as refusal:
                found = str(refusal)
            self.alike[key] = found
        if isinstance(found, str):
            raise Refused(found)
        self.readings[name] = found
        return found

    def _read(self, name: str, twin: nn.Module, opaque: set[str]) -> Reading:
        prefix = f"{name}." if name else ""
        captured = self._capture(twin, opaque, prefix)
        graph, lookup = _copy(captured.graph), parts.Modules(twin)
        parts.find(graph, twin)
        match.drop_identities(graph, lookup)
        foreign = {n for n in opaque if not match.plain_leaf(twin.get_submodule(n))
                   or "forward" in twin.get_submodule(n).__dict__}
        match.check_inplace(graph, lookup, foreign)
        found, reasons = match.find(graph, lookup)
        why = {str(conv.target): reason for conv, reason in reasons.items()}
        whole = {n: twin.get_submodule(n) for n in captured.inlined}
        why.update((n, f"the forward of a {type(m).__name__} is more than a convolution with its own weight")
                   for n, m in whole.items() if isinstance(m, nn.Conv2d)
                   and n not in why and n not in {str(made.conv.target) for made in found})
        if not any(node.op == "placeholder" for node in graph.nodes):
            found = []
        reading = Reading(captured, foreign, why, graph, found, {})
        if found:
            self._routes(reading, twin, opaque, prefix)
        return reading

    def _routes(self, reading: Reading, twin: nn.Module, opaque: set[str], prefix: str) -> None:
        """Fills in what runs in training."""
        captured = reading.captured
        reads = "training" in captured.names
        found = _sketch(twin, captured, reading.foreign, False if reads else None)
        reading.routes = {False: found, True: found}
        if reads:
            twin.train()
            try:
                reading.training = self._capture(twin, opaque, prefix)
                reading.routes[True] = _sketch(twin, reading.training, reading.foreign, True)
            except Refused as refusal:
                reading.routes[True] = f"in training: {refusal}"
            finally:
                twin.eval()

    def _capture(self, twin: nn.Module, opaque: set[str], prefix: str) -> Captured:
        def known(name: str, module: nn.Module) -> Captured | None:
            """What was captured of a submodule, if that still is what its forward would do."""
            reading = self.readings.get(prefix + name)
            if reading is None or self.structures.number(module) is None:
                return None
            modes = _modes(module)
            for captured in (reading.captured, reading.training):
                if captured is not None and ("training" not in captured.names or captured.modes == modes):
                    return captured
            return None

        return capture(twin, opaque, known)


def _modes(module: nn.Module) -> tuple[bool, ...]:
    return tuple([m.training for m in module.modules()])


def _sketch(twin: nn.Module, captured: Captured, foreign: set[str], mode: bool | None) -> route.Sketch | str:
    """What a route is made from, or why there is none."""
    graph = _copy(captured.graph)
    try:
        parts.find(graph, twin, norms=mode is not None)
        return route.sketch(captured, graph, parts.Modules(twin), foreign, mode)
    except Refused as refusal:
        return f"in training: {refusal}"


def _copy(graph: fx.Graph) -> fx.Graph:
    twin = fx.Graph()
    twin.output(twin.graph_copy(graph, {}))
    return twin
