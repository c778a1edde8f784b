"""What a training run found out: accuracy, recall, the fused network beside the stock one, two curves side by side."""

from __future__ import annotations

import copy
import functools
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from fused_resnet import fusing, timing
from fused_resnet.bench.steps import saved_bytes
from fused_resnet.bench.stock import in_memory_format
from fused_resnet.bench.training import Step
from fused_resnet.cli.processes import Processes
from fused_resnet.cli.recipe import AMP, Recipe
from fused_resnet.cli.trainer import Trainer, predict

TIMED = 256  # images in a timed batch
WORST = 10  # classes and confusions that are shown
SECONDS = 4.0  # of each timing


@dataclass(frozen=True)
class Outcome:
    """Written as train.json, with the recipe and the curves."""

    data: str
    model: str
    epochs: int
    seconds: float
    accuracy: float
    recall: dict[str, float]  # per class, on the held-out images
    confused: list[tuple[str, str, int]]  # (class, what it was taken for, how often), the most frequent first
    equal_top1: int
    held_out: int
    fused_ms: float
    stock_ms: float
    speedup: float  # over the better of eager NCHW and channels_last
    error: str
    training: dict[str, Any] | None = None  # of two runs: see `training`


@torch.no_grad()
def compare(net: nn.Module, trained: Trainer) -> Outcome:
    """Predictions of the held-out images, stock and fused, and the time of one batch.

    Args:
        net: the trained network with stock modules, on its device.
        trained: the run that trained it.
    """
    data, device = trained.data, trained.device
    net.eval()
    last = in_memory_format(net, torch.channels_last)
    contiguous = in_memory_format(copy.deepcopy(net), torch.contiguous_format)
    fused = fusing.fuse(last, memory_format=torch.channels_last)
    y = data.test_y
    stock_says, fused_says = predict(last, data, device), predict(fused, data, device)
    counts = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64)
    counts.index_put_((y, stock_says), torch.ones_like(y), accumulate=True)
    places = torch.arange(len(y))
    pools = [data.test_x[chosen].to(device).contiguous() for chosen in places.split(TIMED)[:8]
             if len(chosen) == min(TIMED, len(y))]
    verdict = fusing.verify(last, fused, pools[0])
    pools_last = [pool.to(memory_format=torch.channels_last) for pool in pools]
    samples = timing.measure({"eager": contiguous, "eager_channels_last": last, "fused": fused},
                             {"eager": pools, "eager_channels_last": pools_last, "fused": pools_last},
                             device=device.type, budget=SECONDS)
    best = min(("eager", "eager_channels_last"), key=lambda name: statistics.median(samples[name]))
    return Outcome(data.name, trained.recipe.name, trained.epochs, round(trained.seconds, 1),
                   float((stock_says == y).float().mean()), _recall(counts, data.classes),
                   _confused(counts, data.classes), int((stock_says == fused_says).sum()), len(y),
                   statistics.median(samples["fused"]), statistics.median(samples[best]),
                   timing.paired_ratio(samples[best], samples["fused"]), str(verdict))


def _recall(counts: torch.Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    """Of [truth, prediction] counts; classes without held-out images are left out."""
    return {name: int(counts[i, i]) / int(counts[i].sum()) for i, name in enumerate(classes) if int(counts[i].sum())}


def _confused(counts: torch.Tensor, classes: tuple[str, ...]) -> list[tuple[str, str, int]]:
    wrong = counts.clone().fill_diagonal_(0)
    most, places = wrong.flatten().topk(min(WORST, wrong.numel()))
    return [(classes[p // len(classes)], classes[p % len(classes)], n)
            for n, p in zip(most.tolist(), places.tolist(), strict=True) if n]


def training(nets: dict[str, nn.Module], trainers: dict[str, Trainer], recipe: Recipe,
             here: Processes) -> dict[str, Any]:
    """Both runs side by side: how far their losses lie apart, and what a step costs.

    Args:
        nets: "stock" and "fused", as they begin.
        trainers: the runs.
        recipe: of one process.
        here: this process, alone.
    """
    stock, fused = (trainers[way].curve for way in ("stock", "fused"))
    apart = [abs(a - b) for a, b in zip(stock.loss, fused.loss, strict=True)]
    batch = Trainer(nets["fused"], trainers["fused"].data, recipe, here).batches(0)[0]
    calls = {way: Step(net.train(), AMP.get(recipe.amp or "")) for way, net in nets.items()}
    kind = torch.device(here.device).type
    samples = timing.measure(calls, {way: [batch] for way in calls}, device=kind, budget=SECONDS)  # type: ignore[arg-type]
    cost = {}
    for way, call in calls.items():
        with timing.PeakMemory(kind) as peak:
            call(batch)
        cost[way] = {"ms": statistics.median(samples[way]), "peak_mb": peak.mb if kind == "cuda" else None,
                     "saved_mb": saved_bytes(functools.partial(call.loss, batch), call.model) / 2**20}
    return {"equal_steps": sum(a == 0 for a in apart), "steps": len(apart), "largest_difference": max(apart),
            "mean_difference": statistics.fmean(apart), "accuracy": {"stock": stock.accuracy[-1],
                                                                     "fused": fused.accuracy[-1]},
            "step": cost, "step_speedup": timing.paired_ratio(samples["stock"], samples["fused"])}


def table(o: Outcome) -> Table:
    """The outcome for a terminal."""
    shown = Table(title=f"{o.model} on {o.data}: {o.epochs} epochs in {o.seconds:.0f} s", title_justify="left",
                  show_header=False)
    shown.add_row("accuracy, held out", f"{o.accuracy:.2%} of {o.held_out}")
    lowest = sorted(o.recall, key=o.recall.__getitem__)[:WORST] if len(o.recall) > WORST else list(o.recall)
    shown.add_row("recall" if len(lowest) == len(o.recall) else "lowest recall",
                  "  ".join(f"{name} {o.recall[name]:.0%}" for name in lowest))
    if o.confused:
        shown.add_row("taken for another", "  ".join(f"{a} for {b}: {n}" for a, b, n in o.confused[:5]))
    shown.add_row("fused predictions", f"{o.equal_top1} of {o.held_out} equal to stock")
    shown.add_row("fused outputs", o.error)
    shown.add_row("speed", f"{o.fused_ms:.2f} ms fused, {o.stock_ms:.2f} ms best eager: {o.speedup:.2f}x")
    if o.training is not None:
        t, step = o.training, o.training["step"]
        shown.add_row("losses, fused and stock", f"{t['equal_steps']} of {t['steps']} equal to the last bit, at most "
                      f"{t['largest_difference']:.2g} apart")
        shown.add_row("accuracies", f"{t['accuracy']['fused']:.2%} fused, {t['accuracy']['stock']:.2%} stock")
        shown.add_row("training step", f"{step['fused']['ms']:.2f} ms fused, {step['stock']['ms']:.2f} ms stock: "
                      f"{t['step_speedup']:.2f}x")
        shown.add_row("saved for backward", f"{step['fused']['saved_mb']:.1f} MB fused, "
                      f"{step['stock']['saved_mb']:.1f} MB stock")
        if step["fused"]["peak_mb"] is not None:
            shown.add_row("peak memory", f"{step['fused']['peak_mb']:.0f} MB fused, "
                          f"{step['stock']['peak_mb']:.0f} MB stock")
    return shown
