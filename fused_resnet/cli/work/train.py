"""What `fused-resnet train` does: a training run for each way, what is compared, written and printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_resnet import fusing
from fused_resnet.bench import curves, results
from fused_resnet.bench.stock import OWN, restored
from fused_resnet.cli import checkpoints, console, datasets, models, outcome
from fused_resnet.cli.datasets import Data
from fused_resnet.cli.processes import Processes
from fused_resnet.cli.recipe import Recipe, build
from fused_resnet.cli.trainer import Trainer

SMALL = 32  # pixels that a cifar_resnet is given of a folder's pictures
SHOWN = 0.95  # share of the progress bar that training takes


def ways_of(fused: bool, stock: bool, both: bool, recompute: bool) -> tuple[str, ...]:
    """"stock", "fused" or both, in the order in which they train.

    Raises:
        ValueError: options that exclude each other.
    """
    if fused + stock + both > 1:
        raise ValueError("--fused, --stock and --both exclude each other")
    if stock and recompute:
        raise ValueError("--recompute is of fused blocks, --stock trains without them")
    return ("stock", "fused") if both else ("stock",) if stock else ("fused",)


class Run:
    """One call of the command: its data, and a training run for each of `ways`."""

    def __init__(self, recipe: Recipe, who: Processes, ways: tuple[str, ...], out: Path | None, quiet: bool):
        self.recipe, self.who, self.ways, self.out = recipe, who, ways, out
        self.quiet = quiet or not who.leads
        small = recipe.model is None and recipe.data not in (None, *datasets.SETS)
        self.data = datasets.load(recipe.data, SMALL if small and recipe.size is None else recipe.size)
        self.data = self.data.limited(recipe.limit)
        if recipe.model is not None and self.data.channels == 1:
            self.data = _as_taken(self.data, models.resolve(recipe.model, recipe.seed)[1])

    def carry_out(self, budget: float, resume: bool, as_json: bool) -> int:
        """Trains, compares, writes and prints; the command's exit code."""
        files = {way: checkpoints.file(self.out, way, len(self.ways) == 1) for way in self.ways} if self.out else {}
        if resume and not any(path.exists() for path in files.values()):
            raise ValueError(f"--resume: {'there is no checkpoint in ' + str(self.out) if self.out else 'needs --out'}")
        if not resume:
            checkpoints.protect(list(files.values()))
        trainers: dict[str, Trainer] = {}
        with console.progress(len(self.ways), self.quiet) as show:
            with checkpoints.caught() as signal:
                for way in self.ways:
                    trainers[way] = self.trainer(way, files.get(way) if resume else None)
                    if not trainers[way].epochs and len(trainers) > 1:
                        trainers[way].epochs = trainers[self.ways[0]].epochs
                    elif not trainers[way].epochs:
                        trainers[way].pace(budget / len(self.ways))
                    self.fit(way, trainers[way], files.get(way), signal, show)
            show("evaluate, fuse, compare", len(self.ways) - 1 + SHOWN)
            found = self.found(trainers) if self.who.leads else None
        self.who.wait()
        return 0 if found is None else self.tell(found, trainers, as_json)

    def trainer(self, way: str, file: Path | None) -> Trainer:
        """Of a new network, or where the run that wrote `file` was."""
        made = Trainer(variant(self.recipe, self.data, way, self.who), self.data, self.recipe, self.who)
        if file is not None and file.exists():
            checkpoints.resume(file, made, way)
        return made

    def fit(self, way: str, trainer: Trainer, file: Path | None, signal: Callable[[], int],
            show: Callable[[str, float], None]) -> None:
        """Trains to the end, with a checkpoint after every epoch."""
        def save() -> None:
            if file is not None and self.who.leads:
                checkpoints.write(file, trainer, way)

        before = self.ways.index(way)
        trainer.run(save=save, signal=signal, tell=lambda what, share: show(f"{way}: {what}", before + SHOWN * share))

    def found(self, trainers: dict[str, Trainer]) -> outcome.Outcome:
        """The last run's network beside its fused form, and both runs beside each other where there are two."""
        last = trainers[self.ways[-1]]
        net = build(self.recipe, self.data)
        net.load_state_dict(last.net.state_dict())
        found = outcome.compare(net.to(self.who.device), last)
        if len(self.ways) == 1:
            return found
        alone = replace(self.recipe, sync_bn=False, processes=1)
        here = Processes(0, 1, self.who.device)
        nets = {way: variant(alone, self.data, way, here) for way in self.ways}
        return replace(found, training=outcome.training(nets, trainers, alone, here))

    def tell(self, found: outcome.Outcome, trainers: dict[str, Trainer], as_json: bool) -> int:
        """Writes train.json and the curves, prints the table; the exit code."""
        drawn = {way: trainer.curve for way, trainer in trainers.items()}
        record = {**asdict(found), "recipe": asdict(self.recipe), "curves": {k: asdict(v) for k, v in drawn.items()},
                  "environment": results.describe_environment(), "commit": results.commit()}
        if self.out is not None:
            (self.out / "train.json").write_text(results.to_text(record) + "\n")
            curves.draw(drawn, self.out / "curves.png", f"{self.recipe.name} on {self.data.name}, "
                        f"{self.recipe.joint} images a step")
        if as_json:
            console.emit(record)
        else:
            console.out.print(outcome.table(found))
        return 0 if found.equal_top1 == found.held_out else 1


def _as_taken(data: Data, net: nn.Module) -> Data:
    """Grey images in as many channels as the model's first convolution reads."""
    first = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    return data.coloured() if first is not None and first.in_channels == 3 else data


def variant(recipe: Recipe, data: Data, way: str, who: Processes) -> nn.Module:
    """The network of a recipe on the device of `who`, with stock modules or fused.

    Raises:
        ValueError: what `build` raises; nothing can be fused; --sync-bn where the modules cannot do it.
    """
    net = build(recipe, data)
    if recipe.sync_bn and who.device != "cpu":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    if way == "fused":
        net = _fused(net, recipe)
    if recipe.sync_bn and who.device == "cpu" and who.count > 1 and not _set(net, "process_group", who.group):
        raise ValueError("--sync-bn on a CPU needs blocks of fused_resnet: train one of its models with --fused")
    return net.to(who.device)


def _fused(net: nn.Module, recipe: Recipe) -> nn.Module:
    """Models of ours with their own forwards, any other through `fuse`."""
    own, recompute = restored(net), recipe.recompute or None
    if own is not None:
        _set(own, "recompute", recompute)
        return own
    fused = fusing.fuse(net, memory_format=torch.channels_last if recipe.channels_last else None, recompute=recompute)
    report = fusing.report(fused)
    if not report.fused:
        raise ValueError(f"nothing of {recipe.name} can be fused ({next(iter(report)).reason}): --stock trains it"
                         if len(report) else f"{recipe.name} has no convolutions: --stock trains it")
    return fused


def _set(net: nn.Module, name: str, value: Any) -> int:
    """Sets an attribute of every block that obeys it: ours, but not their plain twins. Says how many there are."""
    blocks = [module for module in net.modules() if hasattr(type(module), name) and type(module) not in OWN]
    for block in blocks:
        setattr(block, name, value)
    return len(blocks)
