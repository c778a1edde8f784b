"""`fused-resnet tune`: measures what a model's problems run fastest on here, and keeps it for this user."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from fused_resnet.cli import options, words


def tune(
    model: Annotated[list[str], typer.Option(help=f"may be repeated: {words.SOURCES}",
                                             autocompletion=options.complete_models)] = ["resnet50", "resnet18"],  # noqa: B006
    batch: Annotated[list[str], typer.Option(help="may be repeated: batch sizes")] = ["1", "8"],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="may be repeated: fp32, tf32, bf16, fp16",
                                             autocompletion=options.complete_dtypes)] = ["fp32", "bf16"],  # noqa: B006
    device: options.Device = None,
    size: options.Size = words.SIZE,
    channels: Annotated[int, typer.Option(help="channels of the input", min=1)] = 3,
    layer: Annotated[str, typer.Option(help="only problems whose name contains this, such as r3s3")] = "",
    budget: Annotated[float, typer.Option(help="seconds, shared between the problems", min=0)] = 300,
    threads: options.Threads = None,
    again: Annotated[bool, typer.Option("--again", help="measure what has been measured before, too")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Times every kernel on every problem of the models, wrong ones left out, and keeps the winners.

    Interrupted, it keeps what is done; started again, it goes on from there.
    """
    from fused_resnet.cli import console, models
    from fused_resnet.cli.work import tune as work

    deadline = time.perf_counter() + budget
    console.set_threads(threads)
    where = console.device_of(device)
    dtypes = console.choices(",".join(dtype), words.DTYPES, "--dtype")
    batches = console.numbers(",".join(batch), "--batch")
    if where == "cpu" and "tf32" in dtypes:
        raise ValueError("--dtype tf32 needs --device cuda")
    built = dict(models.resolve(spec) for spec in console.split(",".join(model)))
    found: dict[work.Key, work.Entry] = {}
    runs = [run for name, stock in built.items() for kind in dtypes
            for run in work.runs_of(name, stock, kind, batches, (channels, size, size), where, found)]
    chosen = {key: entry for key, entry in found.items() if layer in entry.problem.id}
    if not chosen:
        raise ValueError(f"no problem of {', '.join(built)} has {layer!r} in its name; one of them is "
                         f"{next(iter(found.values())).problem.id}" if found else
                         f"nothing of {', '.join(built)} could be fused; `fused-resnet inspect` says why" if built else
                         f"--model names no model: expected {words.SOURCES}")
    todo = {key: entry for key, entry in chosen.items() if again or not work.tuned(key)}
    if len(todo) < len(chosen):
        console.say(f"{len(chosen) - len(todo)} of {len(chosen)} problems have been tuned before; --again repeats them",
                    quiet)
    try:
        work.measure(runs, todo, deadline, quiet)
    finally:
        work.show(where, todo, as_json, quiet)
