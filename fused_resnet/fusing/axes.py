"""Geometry of the page's roofline: logarithmic axes, roof, points, in the units of an SVG view box."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fused_resnet.problem import ConvProblem

if TYPE_CHECKING:
    from fused_resnet.fusing.page import Bar, Timings

WIDTH, HEIGHT = 760.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 74.0, 20.0, 22.0, 58.0
ROOM = 1.35  # factor between the outermost points and the frame
SMALL, LARGE = 4.5, 11.0  # radii: of a launch that takes nothing, added for one that takes all
KINDS = ("1x1", "3x3", "other", "grouped")


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis from the values `low`..`high` to the places `start`..`end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> Scale:
        return cls(min(values) / ROOM, max(values) * ROOM, start, end)

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str, bool]]:
        """(place, label, whether narrow pages show it): decades, with 2 and 5 between them where there are few."""
        span = self.high / self.low
        factors = (1,) if span > 300 else (1, 2, 5) if span > 12 else (1, 2, 3, 5, 7)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
        return [(self(f * 10.0**p), f"{f * 10.0**p:,.6g}", f in (1, 2, 5)) for p in powers for f in factors
                if self.low <= f * 10.0**p <= self.high]


@dataclass(frozen=True)
class Point:
    """A distinct launch."""

    x: float
    y: float
    radius: float
    kind: str
    text: str
    number: int  # of its first convolution in the list of launches


@dataclass(frozen=True)
class Plot:
    """What the template draws."""

    x: Scale
    y: Scale
    points: list[Point]
    quantity: str  # what stands on the y axis
    measured: bool
    roof: list[tuple[float, float]] = field(default_factory=list)
    ridge: float | None = None  # FLOP/byte where the two ceilings meet

    @property
    def line(self) -> str:
        return " ".join(f"{x},{y}" for x, y in self.roof)

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if any(point.kind == kind for point in self.points)]


def roofline(bars: Sequence[Bar], problems: Mapping[str, ConvProblem], timings: Timings) -> Plot | None:
    """Intensity against GFLOP/s: measured, else what the ceilings allow; without ceilings against a launch's work."""
    counts = Counter(bar.row.problem for bar in bars if bar.row.problem)
    first = {bar.row.problem: bar for bar in reversed(bars)}
    timed = any(name in timings.ms for name in counts)
    peaks = None if timings.gflops is None or timings.gbytes is None else (timings.gflops, timings.gbytes)
    shown = {name: problems[name] for name in counts if name in timings.ms or not timed}
    if not shown:
        return None
    across = {name: p.flops / p.bytes for name, p in shown.items()}
    up = {name: _height(p, timings.ms[name][1] if timed else None, peaks) for name, p in shown.items()}
    load = {name: counts[name] * (timings.ms[name][1] if timed else p.flops) for name, p in shown.items()}
    ridge = peaks[0] / peaks[1] if peaks else None
    xs = Scale.of([*across.values(), *([ridge] if ridge else [])], LEFT, WIDTH - RIGHT)
    ys = Scale.of([*up.values(), *([peaks[0]] if peaks else [])], HEIGHT - BOTTOM, TOP)
    what = ("GFLOP/s, measured" if timed else "GFLOP/s that the ceilings allow" if peaks
            else "GFLOP of one launch, computed")
    radii = {name: round(SMALL + LARGE * math.sqrt(load[name] / sum(load.values())), 1) for name in shown}
    points = [Point(xs(across[name]), ys(up[name]), radii[name], kind(p),
                    _text(first[name], counts[name], across[name], up[name], what), first[name].number)
              for name, p in sorted(shown.items(), key=lambda item: -load[item[0]])]
    return Plot(xs, ys, points, what, timed, _roof(xs, ys, peaks), ridge)


def _height(p: ConvProblem, ms: float | None, peaks: tuple[float, float] | None) -> float:
    if ms is not None:
        return p.flops / ms / 1e6
    return p.flops / 1e9 if peaks is None else min(peaks[0], p.flops / p.bytes * peaks[1])


def _text(bar: Bar, count: int, intensity: float, height: float, what: str) -> str:
    more = f" and {count - 1} more" if count > 1 else ""
    return f"{bar.row.name}{more}: {bar.shape}; {intensity:.3g} FLOP/byte, {height:.3g} {what}"


def _roof(xs: Scale, ys: Scale, peaks: tuple[float, float] | None) -> list[tuple[float, float]]:
    """The slope of the copy's bandwidth from the lower or left edge, then the flat roof of the product."""
    if peaks is None:
        return []
    left = max(xs.low, ys.low / peaks[1])
    corner = min(max(peaks[0] / peaks[1], left), xs.high)
    return [(xs(x), ys(min(peaks[0], x * peaks[1]))) for x in (left, corner, xs.high)]


def kind(p: ConvProblem) -> str:
    """What sort of convolution it is, for the shape and colour of its point."""
    if p.groups > 1:
        return "grouped"
    return f"{p.R}x{p.S}" if p.R == p.S and p.R in (1, 3) else "other"
