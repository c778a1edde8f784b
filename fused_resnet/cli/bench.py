"""`fused-resnet bench`: the main job, on real photographs, beside the peers."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fused_resnet.cli import options, words


def bench(
    model: Annotated[str, typer.Option(help=f"comma-separated: {words.SOURCES}",
                                       autocompletion=options.complete_models)] = "resnet50,resnet18",
    batch: Annotated[str, typer.Option(help="comma-separated batch sizes")] = "1,8",
    mode: Annotated[str, typer.Option(help="comma-separated: inference, training; or all. A training step is forward, "
                                      "cross-entropy, backward, SGD with momentum; 16 bits by autocast")] = "inference",
    dtype: Annotated[str, typer.Option(help="comma-separated: fp32, tf32, bf16, fp16; or int8 on a CPU, "
                                       "quantised on the pictures",
                                       autocompletion=options.complete_benched)] = "fp32,bf16",
    device: options.Device = None,
    provider: Annotated[str | None, typer.Option(help="comma-separated; default: all that are available",
                                                 autocompletion=options.complete_providers)] = None,
    weights: Annotated[Path | None, typer.Option(help="state dict for the model (one model only)")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of pictures; default: scikit-image's")] = None,
    size: options.Size = words.SIZE,
    layers: Annotated[bool, typer.Option("--layers", help="each distinct launch of the fused model by itself, beside "
                                         "its roofline, in place of whole models")] = False,
    html: Annotated[Path | None, typer.Option(help="with --layers: write the report with these times as a page; of "
                                              "several jobs one page each, named after the job")] = None,
    budget: Annotated[float, typer.Option(help="seconds; the slow compilers are dropped first", min=0)] = 225,
    dark: Annotated[bool, typer.Option("--dark", help="charts with light ink on a dark ground")] = False,
    threads: options.Threads = None,
    out: Annotated[Path | None, typer.Option(help="folder; default: benchmarks/results/<machine>")] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(metavar="OLD NEW", help="measure nothing: compare two "
                       "results files row by row. A row has changed where a rank test of its samples says so (Mann-"
                       "Whitney, p < 0.01), or in files without samples where the intervals p20 .. p80 do not touch; "
                       "else it is within noise. --provider selects rows")] = None,
    fail_slower: Annotated[float | None, typer.Option(metavar="PERCENT", min=0, help="with --compare: exit code 1 when "
                           "a row is slower by more than this and by more than noise, or no longer runs")] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> int:
    """Times whole models against eager PyTorch, its compilers and the peers, after comparing them with fp64.

    Exit code 1: a fused model is out of tolerance.
    """
    if compare is not None:
        from fused_resnet.cli import compare as comparison

        return comparison.run(compare, provider, fail_slower, as_json, quiet)
    if fail_slower is not None:
        raise ValueError("--fail-slower goes with --compare")
    if html is not None and not layers:
        raise ValueError("--html goes with --layers; `fused-resnet inspect --html FILE` shows a model without times")
    from fused_resnet.bench import pictures, providers, results, session
    from fused_resnet.cli import console, page
    from fused_resnet.cli.work import bench as work

    started = time.perf_counter()
    console.set_threads(threads)
    where = console.device_of(device)
    modes = list(words.MODES) if mode == "all" else console.choices(mode, words.MODES, "--mode")
    chosen = [p for each in modes for p in providers.select(console.split(provider) or None, where, each)]
    dtypes, batches = console.choices(dtype, words.BENCHED, "--dtype"), console.numbers(batch, "--batch")
    built = work.models_of(console.split(model), weights)
    jobs = session.jobs(list(built), batches, dtypes, [where], modes)
    if not jobs:
        raise ValueError("training needs a --batch of 2 or more and another --dtype than fp16")
    sheet = work.Sheet(console.writable(out or Path("benchmarks/results") / results.machine_slug()) / "bench.json",
                       work.begin(images, size, weights))
    page.target(html)
    photographs = pictures.load(max(work.CALIBRATION, *batches), folder=images, size=size)
    work.prepare(built, weights, photographs, quiet)
    run = work.Run(built, photographs, sheet, started + budget, as_json, quiet, dark)
    code = run.layers(jobs, html) if layers else run.models(jobs, chosen)
    console.say(f"{len(sheet.record.rows)} rows in {sheet.path}" + "".join(f", {file}" for file in run.files)
                + f"; {time.perf_counter() - started:.0f} s", quiet)
    if as_json:
        console.emit({"file": str(sheet.path), **replace(sheet.record, rows=sheet.added).to_dict()})
    return code
