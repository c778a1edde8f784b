"""Charts: every provider beside the others, grouped by model, dtype and batch; single launches below their roofline."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fused_resnet.bench.results import EAGER, Results, Row
from fused_resnet.fusing import axes

if TYPE_CHECKING:
    from fused_resnet.bench.layers import Ceilings, Layer

# Ours stands out, stock is grey, peers keep one colour each (Okabe and Ito's palette, safe for colour-blind readers).
Key = tuple[str, str, str, int, str]  # `Row.group`
COLOURS = {"eager": "#c4c4c4", "eager_channels_last": "#8c8c8c", "fused": "#d55e00", "inductor_freezing": "#0072b2",
           "compile": "#56b4e9", "compile_max_autotune": "#004c7a", "openvino": "#009e73", "onnxruntime": "#e69f00",
           "tensorrt": "#76b900", "fused_cpu": "#e08a4e", "fused_cudnn": "#e8a87c", "fused_triton": "#b34700",
           "fused_cuda": "#7a2f00",
           "fused_recompute": "#f2c09a"}
ORDER = tuple(COLOURS)
GRAPH_HATCH = "///"
GROUPS_A_LINE = 4
MARKERS = {"1x1": ("o", "#0072b2"), "3x3": ("s", "#d55e00"), "other": ("^", "#cc79a7"), "grouped": ("D", "#009e73")}


class Theme(NamedTuple):
    """Colours that follow the ground."""

    ink: str
    ground: str
    grid: str


THEMES = {False: Theme("#1c1e22", "#ffffff", "#e5e5e5"), True: Theme("#ebebec", "#131519", "#31353d")}


def speedups(results: Results, path: str | os.PathLike[str], *, dark: bool = False) -> Path | None:
    """Draws speed over the best eager row, higher is better, with milliseconds on the bars.

    The line through a bar's end spans the 20th to the 80th percentile of its own times.

    Args:
        results: its rows of level "model" and status "ok" are drawn.
        path: the PNG to write.
        dark: light ink on a dark ground.

    Returns:
        `path`, or None when there is nothing to draw.

    Raises:
        ValueError: the file cannot be written.
    """
    groups = _groups(results.rows)
    if not groups:
        return None
    a_line = min(GROUPS_A_LINE, len(groups))
    lines = -(-len(groups) // a_line)
    tallest = max(_span(row)[1] for _, rows in groups for row in rows)
    width, height = max(8.5, 3.4 * a_line), 1.0 + 3.3 * lines
    theme = THEMES[dark]
    with _canvas(path, theme) as plt:
        figure, axes = plt.subplots(lines, 1, figsize=(width, height), squeeze=False, sharey=True)
        for line, ax in enumerate(axes[:, 0]):
            _draw(ax, groups[line * a_line:(line + 1) * a_line], tallest, a_line, theme)
        names = [name for name in ORDER if any(row.provider == name for _, rows in groups for row in rows)]
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
        if any(row.graph for _, rows in groups for row in rows):
            names.append("as a CUDA graph")
            handles.append(plt.Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=theme.ink, hatch=GRAPH_HATCH))
        figure.suptitle("Speed over the best eager PyTorch: higher is better; the number at a bar is milliseconds, its "
                        f"line p20 to p80\n{_machine(results.environment)}", fontsize=11, y=0.99)
        columns = 4 if a_line < 3 else 8
        figure.legend(handles, names, loc="lower center", ncol=min(len(names), columns), frameon=False, fontsize=9)
        figure.tight_layout(rect=(0, (0.32 if len(names) <= columns else 0.55) / height, 1, 1))
    return Path(path)


def roofline(layers: Sequence[Layer], ceilings: Ceilings, path: str | os.PathLike[str], title: str, *,
             dark: bool = False) -> Path | None:
    """Draws the measured FLOP/s of every launch over its arithmetic intensity, below what the machine allows.

    Args:
        layers: what `bench.layers.measure` returned; a point's area is its share of the time of a forward, its line
            spans p20 to p80.
        ceilings: the machine's, measured.
        path: the PNG to write.
        title: the job.
        dark: light ink on a dark ground.

    Returns:
        `path`, or None when there is nothing to draw.

    Raises:
        ValueError: the file cannot be written.
    """
    shown = [layer for layer in layers if layer.row.ms_p50]
    if not shown:
        return None
    theme, whole = THEMES[dark], sum(layer.count * (layer.row.ms_p50 or 0.0) for layer in shown)
    with _canvas(path, theme) as plt:
        figure, ax = plt.subplots(figsize=(9, 5.4))
        for kind, (marker, colour) in MARKERS.items():
            for layer in (each for each in shown if axes.kind(each.problem) == kind):
                x, (low, y, high) = layer.problem.flops / layer.problem.bytes, _rates(layer)
                share = layer.count * (layer.row.ms_p50 or 0.0) / whole
                ax.plot([x, x], [low, high], color=colour, linewidth=1.2, alpha=0.55, zorder=2)
                ax.scatter(x, y, 30 + 500 * share, marker=marker, color=colour, edgecolor=theme.ground, linewidth=0.8,
                           alpha=0.85, zorder=3)
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(plt.LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:,.6g}"))
            axis.set_minor_locator(plt.NullLocator())
        _roof(ax, ceilings, theme)
        kinds = [kind for kind in MARKERS if any(axes.kind(layer.problem) == kind for layer in shown)]
        ax.legend([ax.scatter([], [], marker=MARKERS[kind][0], color=MARKERS[kind][1]) for kind in kinds], kinds,
                  frameon=False, loc="lower right", fontsize=9)
        _tidy(ax, "arithmetic intensity, FLOP/byte", "GFLOP/s, measured", theme)
        ax.grid(axis="x", color=theme.grid, zorder=0)
        figure.suptitle(f"{title}: launches and what this machine allows\narea: share of the time, line: p20 to p80",
                        fontsize=11)
        figure.tight_layout()
    return Path(path)


def _rates(layer: Layer) -> tuple[float, float, float]:
    """GFLOP/s at p80, p50 and p20."""
    row = layer.row
    low, middle, high = (layer.problem.flops / (ms or 1.0) / 1e6 for ms in (row.ms_p80, row.ms_p50, row.ms_p20))
    return low, middle, high


def _roof(ax: Any, ceilings: Ceilings, theme: Theme) -> None:
    """The slope of the bandwidth and the flat of the product, over the width of the points."""
    left, right = ax.get_xlim()
    ridge = ceilings.gflops / ceilings.gbytes
    left, right = min(left, ridge / 2), max(right, ridge * 2)
    ax.plot([left, ridge, right], [left * ceilings.gbytes, ceilings.gflops, ceilings.gflops], color=theme.ink,
            linewidth=1.8, zorder=1)
    ax.set_xlim(left, right)
    ax.set_ylim(top=max(ax.get_ylim()[1], ceilings.gflops * 1.6))
    ax.annotate(f"{ceilings.gflops:.4g} GFLOP/s", (right, ceilings.gflops), (-6, 5), textcoords="offset points",
                ha="right", fontsize=9, fontweight="bold")
    ax.annotate(f"{ceilings.gbytes:.3g} GB/s", (ridge, ceilings.gflops), (-10, 5), textcoords="offset points",
                ha="right", fontsize=9, fontweight="bold")


@contextlib.contextmanager
def _canvas(path: str | os.PathLike[str], theme: Theme) -> Iterator[Any]:
    """pyplot in the colours of a theme; what was drawn goes to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"figure.facecolor": theme.ground, "axes.facecolor": theme.ground, "text.color": theme.ink,
                         "axes.edgecolor": theme.ink, "axes.labelcolor": theme.ink, "xtick.color": theme.ink,
                         "ytick.color": theme.ink, "savefig.facecolor": theme.ground, "hatch.color": theme.ink}):
        try:
            yield plt
            plt.gcf().savefig(path, dpi=110)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            plt.close("all")


def _machine(environment: Mapping[str, Any]) -> str:
    name = environment.get("gpu") or f"{environment.get('cpu')}, {environment.get('threads')} threads"
    return f"{name}, torch {environment.get('torch')}"


def _tidy(ax: Any, across: str, up: str, theme: Theme) -> None:
    """Labels, a faint grid, no frame."""
    ax.set_xlabel(across, fontsize=9)
    ax.set_ylabel(up, fontsize=9)
    ax.grid(axis="y", color=theme.grid, zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _groups(rows: Sequence[Row]) -> list[tuple[Key, list[Row]]]:
    """Drawable rows by group, groups in the order of the file, bars in the order of `ORDER`."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        if row.level == "model" and row.status == "ok" and row.vs_stock and row.provider in COLOURS:
            found.setdefault(row.group, []).append(row)
    def place(item: tuple[Key, list[Row]]) -> tuple:
        model, _, dtype, batch, mode = item[0]
        return mode, model, dtype != "fp32", dtype, -batch

    return [(key, sorted(group, key=lambda row: (row.graph, ORDER.index(row.provider))))
            for key, group in sorted(found.items(), key=place)]


def _span(row: Row) -> tuple[float, float]:
    """The bar's height at the 80th and at the 20th percentile of its times."""
    height, half = row.vs_stock or 0.0, row.ms_p50 or 1.0
    return height * half / (row.ms_p80 or half), height * half / (row.ms_p20 or half)


def _draw(ax: Any, groups: Sequence[tuple[Key, list[Row]]], tallest: float, a_line: int, theme: Theme) -> None:
    width = 0.86 / max(len(rows) for _, rows in groups)
    for place, (_, rows) in enumerate(groups):
        for i, row in enumerate(rows):
            x, height = place + (i - (len(rows) - 1) / 2) * width, row.vs_stock or 0.0
            ours, (low, high) = row.provider.startswith("fused"), _span(row)
            ax.bar(x, height, width * 0.92, color=COLOURS[row.provider], zorder=2,
                   edgecolor=theme.ink if ours or row.graph else "none", linewidth=0.8,
                   hatch=GRAPH_HATCH if row.graph else None)
            for ink, thick in ((theme.ground, 2.8), (theme.ink, 1.1)):  # a rim, for bars as light or dark as the ink
                ax.plot([x, x], [low, high], color=ink, linewidth=thick, solid_capstyle="butt", zorder=3)
            ax.annotate(f"{row.ms_p50:.3g}", (x, max(high, height)), (0, 3), textcoords="offset points",
                        ha="center", va="bottom", fontsize=7.5, fontweight="bold" if ours else "normal", zorder=4,
                        bbox={"facecolor": theme.ground, "edgecolor": "none", "pad": 0.4})
    ax.axhline(1, color=theme.ink, linewidth=0.8, linestyle="--", zorder=1)
    ax.set_xticks(range(len(groups)), [
        f"{model}, {dtype}, batch {batch}" + ", training" * (mode == "training")
        + (f"\nbest eager {_best_eager(rows):.3g} images/s" if rows else "")
        for (model, _, dtype, batch, mode), rows in groups], fontsize=9)
    ax.set_xlim(-0.55, a_line - 0.45)
    ax.set_ylim(0, tallest * 1.12)
    _tidy(ax, "", "x best eager", theme)


def _best_eager(rows: Sequence[Row]) -> float:
    return max((row.images_per_s or 0 for row in rows if row.provider in EAGER), default=0.0)
