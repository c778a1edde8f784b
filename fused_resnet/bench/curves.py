"""Training curves: what a run leaves behind, whether one lies inside the spread of others, and their picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fused_resnet.bench.plots import COLOURS

WINDOW = 25  # steps over which the spread of the stock runs is taken
TWICE = 2.0  # how far a run may lie from the mean of the stock runs, in their largest deviation inside a window
NAMES = {"stock": ("eager", "stock"), "fused": ("fused", "fused_resnet")}  # colour and label


@dataclass
class Curve:
    """One run: the loss of every optimiser step (mean over all processes) and, after every epoch, the accuracy."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def inside(losses: Sequence[float], stock: Sequence[Sequence[float]], *, window: int = WINDOW,
           times: float = TWICE) -> float:
    """The share of steps at which a curve is as close to the mean of stock runs as they are to each other.

    At every step |loss - mean| is compared with `times` the largest deviation of a stock run from the mean of all of
    them within the `window` steps around.

    Args:
        losses: [steps].
        stock: at least two runs that differ by rounding alone, [runs][steps].
    """
    runs = torch.tensor(stock, dtype=torch.float64)
    mean = runs.mean(0)
    spread = (runs - mean).abs().amax(0)
    widest = torch.max_pool1d(spread.view(1, 1, -1), window, 1, window // 2).flatten()[:len(spread)]
    return float(((torch.tensor(losses, dtype=torch.float64) - mean).abs() <= times * widest).double().mean())


def smooth(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """The mean of the last `window` values at every step."""
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def draw(curves: Mapping[str, Curve], path: str | os.PathLike[str], title: str) -> Path:
    """Draws the loss of every step and the accuracy after every epoch of all curves, as PNG and SVG.

    Args:
        curves: "stock" or "fused" -> its curve.
        path: the PNG to write; the SVG lies beside it.

    Raises:
        ValueError: a file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    path = Path(path)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, curve in curves.items():
        colour, label = NAMES[name]
        # The curves may lie on each other: a line below, dashes above it.
        style = {"color": COLOURS[colour], "linestyle": "--"} if name == "fused" else {"color": "black"}
        steps, window = range(1, len(curve.loss) + 1), min(WINDOW, max(1, len(curve.loss) // 12))
        left.plot(steps, curve.loss, color=COLOURS[colour], linewidth=0.5, alpha=0.35)
        left.plot(steps, smooth(curve.loss, window), label=f"{label}, mean of {window} steps", **style)
        right.plot(range(1, len(curve.accuracy) + 1), [100 * a for a in curve.accuracy], label=label, marker="o",
                   markersize=3, **style)
    for ax, across, up in ((left, "step", "loss"), (right, "epoch", "accuracy on held-out images, %")):
        ax.set_xlabel(across)
        ax.set_ylabel(up)
        ax.grid(color="#e5e5e5")
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    right.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
        figure.savefig(path.with_suffix(".svg"))
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        plt.close(figure)
    return path
