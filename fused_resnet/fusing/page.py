"""The report as one HTML page: what the template shows, computed here; how it looks, in `templates/`.

    attainable FLOP/s = min(matmul peak, intensity * copy bandwidth),   intensity = flops / bytes

Source of the roofline: Williams, Waterman, Patterson, "Roofline", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fused_resnet import backends
from fused_resnet.fusing import axes
from fused_resnet.problem import ConvProblem

if TYPE_CHECKING:
    from fused_resnet.fusing.report import Node, Report, Row

Time = tuple[float, float, float]  # the 20th, 50th and 80th percentile, milliseconds
WORST = 6  # launches that the page lists as the furthest above their floors
NODE_CAP = 12  # children of a module that the page shows opened
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
KINDS = {"act": "activation", "maxpool": "pool"}  # parts of a pattern, in the profiler's words where they differ


@dataclass(frozen=True)
class Timings:
    """What was measured of a model's launches on one machine, as `fused-resnet bench --layers` does."""

    ms: Mapping[str, Time] = field(default_factory=dict)  # id of a problem -> time of one launch
    gflops: float | None = None  # ceilings: of a dense product in the model's dtype,
    gbytes: float | None = None  # and of a copy

    def __post_init__(self) -> None:
        for what, value in (("gflops", self.gflops), ("gbytes", self.gbytes)):
            if value is not None and not value > 0:
                raise ValueError(f"{what} must be positive, got {value}")
        for name, time in self.ms.items():
            if len(time) != 3 or not 0 < time[0] <= time[1] <= time[2]:
                raise ValueError(f"{name}: expected rising milliseconds (p20, p50, p80), got {time}")

    def floor(self, problem: ConvProblem) -> float | None:
        """The fewest milliseconds that the ceilings allow, None without ceilings."""
        if self.gflops is None or self.gbytes is None:
            return None
        return max(problem.flops / self.gflops, problem.bytes / self.gbytes) / 1e6


@dataclass(frozen=True)
class Bar:
    """One convolution in the list of launches."""

    row: Row
    number: int
    shape: str = ""
    time: Time | None = None
    floor: float | None = None
    share: float = 0.0  # lengths of bars, of the longest: of the time, or of the FLOPs where nothing was timed
    moved: float = 0.0  # of the bytes
    low: float = 0.0
    high: float = 0.0
    roof: float = 0.0  # of the floor

    @property
    def parts(self) -> list[str]:
        return self.row.pattern.split("+") if self.row.pattern else []


def render(report: Report, timings: Timings | None = None, *, title: str = "",
           launches: Mapping[str, Mapping[str, int]] | None = None,
           environment: Mapping[str, Any] | None = None) -> str:
    """The page as text; see `Report.to_html`."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup, escape
    except ModuleNotFoundError as error:
        raise ValueError("to_html() needs jinja2: pip install 'fused_resnet[cli]'") from error
    timings = timings or Timings()
    found = bars(report, timings)
    drawing = Environment(loader=PackageLoader("fused_resnet.fusing"), autoescape=True, trim_blocks=True,
                          lstrip_blocks=True, undefined=StrictUndefined)
    drawing.filters.update(si=si, ms=milliseconds,
                           breakable=lambda name: Markup(str(escape(name)).replace(".", ".<wbr>")))
    problems = list(report.problems.values())
    return drawing.get_template("report.html").render(
        report=report, title=title or report.modules.get("", "") or "model", bars=found, tree=report.tree(),
        by_name={bar.row.name: bar for bar in found}, opened=opened, skipped=report.skipped(),
        launches=counted(report, launches), plot=axes.roofline(found, report.problems, timings),
        worst=furthest(found), timed=any(bar.time for bar in found), known=bool(problems), timings=timings,
        setting=setting(problems), environment=dict(environment or describe()), totals=totals(found))


def bars(report: Report, timings: Timings) -> list[Bar]:
    """Every convolution with the lengths of its bars."""
    times = {name: timings.ms[name] for name in report.problems if name in timings.ms}
    widest = max((time[2] for time in times.values()), default=0.0)
    flops, moved = (max((getattr(row, what) for row in report), default=0) or 1 for what in ("flops", "bytes"))
    found = []
    for number, row in enumerate(report, 1):
        problem, time = report.problems.get(row.problem), times.get(row.problem)
        if problem is None:
            found.append(Bar(row, number))
        elif time is None:
            found.append(Bar(row, number, shape(problem), share=0.0 if times else row.flops / flops,
                             moved=0.0 if times else row.bytes / moved))
        else:
            floor = timings.floor(problem)
            found.append(Bar(row, number, shape(problem), time, floor, time[1] / widest, 0.0, time[0] / widest,
                             time[2] / widest, min(1.0, (floor or 0.0) / widest)))
    return found


def totals(found: Sequence[Bar]) -> dict[str, float]:
    """Sums over one forward."""
    timed = [bar for bar in found if bar.time is not None]
    whole = sum(bar.time[1] for bar in timed if bar.time)
    floor = sum(bar.floor or 0.0 for bar in timed)
    return {"flops": sum(bar.row.flops for bar in found), "bytes": sum(bar.row.bytes for bar in found),
            "ms": whole, "floor": floor, "share": floor / whole if whole else 0.0, "timed": len(timed)}


def furthest(found: Sequence[Bar]) -> list[dict[str, Any]]:
    """The distinct launches whose repetitions take the most time above what the ceilings allow."""
    counts = Counter(bar.row.problem for bar in found)
    first = {bar.row.problem: bar for bar in reversed(found)}
    rows: list[dict[str, Any]] = [{"bar": bar, "count": counts[name], "above": counts[name] * (bar.time[1] - bar.floor)}
                                  for name, bar in first.items() if bar.time is not None and bar.floor is not None]
    return sorted((row for row in rows if row["above"] > 0), key=lambda row: -row["above"])[:WORST]


def counted(report: Report, launches: Mapping[str, Mapping[str, int]] | None) -> dict[str, Any]:
    """Operators of one forward before and after, and who counted them."""
    if launches is not None:
        stock, fused = launches["stock"], launches["fused"]
        kinds = dict.fromkeys([*stock, *fused])  # both in one order
        return {"stock": dict(stock), "fused": {kind: fused[kind] for kind in kinds if kind in fused},
                "before": sum(stock.values()), "after": sum(fused.values()), "source": "counted by the profiler"}
    parts = Counter(KINDS.get(part, part) for row in report for part in (row.pattern or "conv").split("+"))
    return {"stock": dict(parts), "fused": {"conv": len(report)}, "before": sum(parts.values()), "after": len(report),
            "source": "as the matched patterns say, other operators not counted"}


def opened(node: Node, depth: int) -> bool:
    """Whether the page shows a module's children from the start: the model's, and where something was skipped."""
    return depth < 1 or len(node.children) <= NODE_CAP and any(row.status != "fused" for row in node.rows())


def shape(p: ConvProblem) -> str:
    """`3x3 stride 2, 128 → 256, 56x56`: the last is the input's size."""
    step = p.stride[0] if p.stride[0] == p.stride[1] else p.stride
    stride = "" if step == 1 else f" stride {step}"
    groups = "" if p.groups == 1 else " depthwise" if p.depthwise else f" {p.groups} groups"
    return f"{p.R}x{p.S}{stride}{groups}, {p.C} → {p.K}, {p.H}x{p.W}"


def setting(problems: Sequence[ConvProblem]) -> str:
    """Batch, dtype and device, where all launches have the same."""
    found = {f"batch {p.N}, {p.dtype}, {p.device}" for p in problems}
    return found.pop() if len(found) == 1 else ""


def describe() -> dict[str, Any]:
    """Versions and the device, when nobody says more."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"device": backends.device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version()}


def si(value: float, unit: str = "") -> str:
    """`8.2 GFLOP`"""
    for size, letter in UNITS:
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


def milliseconds(value: float | None) -> str:
    """Three significant digits, as `0.0421` or `12.3`."""
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
