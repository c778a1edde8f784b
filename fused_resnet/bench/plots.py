"""Bar charts of a results file: every provider beside the others, grouped by model, dtype and batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_resnet.bench.results import EAGER, Results, Row

# Ours stands out, stock is grey, peers keep one colour each (Okabe and Ito's palette, safe for colour-blind readers).
Key = tuple[str, str, str, int, str]  # `Row.group`
COLOURS = {"eager": "#c4c4c4", "eager_channels_last": "#8c8c8c", "fused": "#d55e00", "inductor_freezing": "#0072b2",
           "compile": "#56b4e9", "compile_max_autotune": "#004c7a", "openvino": "#009e73", "onnxruntime": "#e69f00",
           "tensorrt": "#76b900", "fused_cpu": "#e08a4e", "fused_cudnn": "#e8a87c", "fused_triton": "#b34700",
           "fused_recompute": "#f2c09a"}
ORDER = tuple(COLOURS)
GRAPH_HATCH = "///"
GROUPS_A_LINE = 4


def speedups(results: Results, path: str | os.PathLike[str]) -> Path | None:
    """Draws speed over the best eager row, higher is better, with milliseconds on the bars.

    Args:
        results: its rows of level "model" and status "ok" are drawn.
        path: the PNG to write.

    Returns:
        `path`, or None when there is nothing to draw.

    Raises:
        ValueError: the file cannot be written.
    """
    groups = _groups(results.rows)
    if not groups:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    a_line = min(GROUPS_A_LINE, len(groups))
    lines = -(-len(groups) // a_line)
    tallest = max(row.vs_stock or 0 for _, rows in groups for row in rows)
    width, height = max(8.5, 3.4 * a_line), 0.9 + 3.3 * lines
    figure, axes = plt.subplots(lines, 1, figsize=(width, height), squeeze=False, sharey=True)
    for line, ax in enumerate(axes[:, 0]):
        _draw(ax, groups[line * a_line:(line + 1) * a_line], tallest, a_line)
    names = [name for name in ORDER if any(row.provider == name for _, rows in groups for row in rows)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    if any(row.graph for _, rows in groups for row in rows):
        names.append("as a CUDA graph")
        handles.append(plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="black", hatch=GRAPH_HATCH))
    environment = results.environment
    machine = environment.get("gpu") or f"{environment.get('cpu')}, {environment.get('threads')} threads"
    figure.suptitle(f"Speed over the best eager PyTorch (higher is better; the number on a bar is milliseconds)\n"
                    f"{machine}, torch {environment.get('torch')}", fontsize=11, y=0.995)
    columns = 4 if a_line < 3 else 8
    figure.legend(handles, names, loc="lower center", ncol=min(len(names), columns), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, (0.32 if len(names) <= columns else 0.55) / height, 1, 1))
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        plt.close(figure)
    return Path(path)


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


def _draw(ax: Any, groups: Sequence[tuple[Key, list[Row]]], tallest: float, a_line: int) -> None:
    width = 0.86 / max(len(rows) for _, rows in groups)
    for place, (_, rows) in enumerate(groups):
        for i, row in enumerate(rows):
            x, height = place + (i - (len(rows) - 1) / 2) * width, row.vs_stock or 0.0
            ours = row.provider.startswith("fused")
            ax.bar(x, height, width * 0.92, color=COLOURS[row.provider], zorder=2,
                   edgecolor="black" if ours or row.graph else "none", linewidth=0.8,
                   hatch=GRAPH_HATCH if row.graph else None)
            ax.annotate(f"{row.ms_p50:.3g}", (x, height), (0, 2), textcoords="offset points",
                        ha="center", va="bottom", fontsize=7.5, fontweight="bold" if ours else "normal", zorder=3,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4})
    ax.axhline(1, color="black", linewidth=0.8, linestyle="--", zorder=1)
    ax.set_xticks(range(len(groups)), [
        f"{model}, {dtype}, batch {batch}" + ", training" * (mode == "training")
        + (f"\nbest eager {_best_eager(rows):.3g} images/s" if rows else "")
        for (model, _, dtype, batch, mode), rows in groups], fontsize=9)
    ax.set_ylabel("x best eager", fontsize=9)
    ax.set_xlim(-0.55, a_line - 0.45)
    ax.set_ylim(0, tallest * 1.12)
    ax.grid(axis="y", color="#e5e5e5", zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _best_eager(rows: Sequence[Row]) -> float:
    return max((row.images_per_s or 0 for row in rows if row.provider in EAGER), default=0.0)
