"""`fused-resnet bench`: the main job, on real photographs, beside the peers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import nn

from fused_resnet.bench import launches, pictures, plots, providers, results, session
from fused_resnet.bench import layers as rooflines
from fused_resnet.cli import console, models

CALIBRATION = 16
MODES = ("inference", "training")
SAME = ("cpu", "cores", "threads", "gpu", "cuda", "torch", "input")  # rows of one file share these


def bench(
    model: Annotated[str, typer.Option(help=f"comma-separated: {models.HELP}")] = "resnet50,resnet18",
    batch: Annotated[str, typer.Option(help="comma-separated batch sizes")] = "1,8",
    mode: Annotated[str, typer.Option(help="comma-separated: inference, training; or all. A training step is forward, "
                                      "cross-entropy, backward, SGD with momentum; 16 bits by autocast")] = "inference",
    dtype: Annotated[str, typer.Option(help="comma-separated: fp32, tf32, bf16, fp16")] = "fp32,bf16",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")] = None,
    provider: Annotated[str | None, typer.Option(help="comma-separated; default: all that are available")] = None,
    weights: Annotated[Path | None, typer.Option(help="state dict for the model (one model only)")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of pictures; default: scikit-image's")] = None,
    size: Annotated[int, typer.Option(help="edge of the input in pixels", min=8)] = pictures.SIZE,
    layers: Annotated[bool, typer.Option("--layers", help="each distinct launch of the fused model by itself, beside "
                                         "its roofline, in place of whole models")] = False,
    budget: Annotated[float, typer.Option(help="seconds; the slow compilers are dropped first", min=0)] = 225,
    threads: Annotated[int | None, typer.Option(help="PyTorch's thread count")] = None,
    out: Annotated[Path | None, typer.Option(help="folder; default: benchmarks/results/<machine>")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notes")] = False,
) -> int:
    """Times whole models against eager PyTorch, its compilers and the peers, after comparing them with fp64."""
    started = time.perf_counter()
    console.set_threads(threads)
    where = console.device_of(device)
    modes = list(MODES) if mode == "all" else console.choices(mode, MODES, "--mode")
    chosen = [p for each in modes for p in providers.select(console.split(provider) or None, where, each)]
    todo = console.choices(dtype, console.DTYPES, "--dtype")
    batches = console.numbers(batch, "--batch")
    specs = console.split(model)
    if weights is not None and len(specs) != 1:
        raise ValueError(f"--weights goes with one --model, got {len(specs)}")
    built = dict(models.resolve(spec) for spec in specs)
    folder = console.writable(out or Path("benchmarks/results") / results.machine_slug())
    photographs = pictures.load(max(CALIBRATION, *batches), folder=images, size=size)
    _prepare(built, weights, photographs, quiet)
    record = results.begin(input=f"{'pictures of ' + str(images) if images else 'scikit-image pictures'}, {size} px",
                           weights=str(weights) if weights else "random, batch norms calibrated on the pictures")
    sheet = _Sheet(folder / "bench.json", record)
    work = session.jobs(list(built), batches, todo, [where], modes)
    if not work:
        raise ValueError("training needs a --batch of 2 or more and another --dtype than fp16")
    if layers:
        _layers(work, built, photographs, sheet, started + budget, quiet)
        return 0
    wrong = 0
    with console.progress(len(work), quiet) as show:
        done = 0
        run = session.Session(built, photographs, chosen, budget - (time.perf_counter() - started),
                              lambda what, share: show(what, done + share))
        for group in run.run(work):
            done += 1
            sheet.add(group.rows)
            wrong += sum(row.status == "wrong" and row.provider.startswith("fused") for row in group.rows)
            console.out.print(table(group))
    chart = plots.speedups(sheet.record, folder / "bench.png")
    console.say(f"{len(sheet.record.rows)} rows in {sheet.path}" + (f", chart in {chart}" if chart else "")
                + f"; {time.perf_counter() - started:.0f} s", quiet)
    return 1 if wrong else 0


def _prepare(built: dict[str, nn.Module], weights: Path | None, photographs: torch.Tensor, quiet: bool) -> None:
    """The user's weights, or random ones with calibrated norms."""
    for name, network in built.items():
        if weights is not None:
            models.load_weights(network, weights)
        else:
            said: list[str] = []
            pictures.calibrate(network, photographs[:CALIBRATION], say=said.append)
            console.say(f"{name}: {said[0]}", quiet)


def _layers(work: list[session.Job], built: dict[str, nn.Module], photographs: torch.Tensor, sheet: _Sheet,
            end: float, quiet: bool) -> None:
    """One table a job; each dtype's ceilings are measured once."""
    ceilings: dict[tuple[str, str], rooflines.Ceilings] = {}
    with console.progress(len(work), quiet) as show:
        for done, job in enumerate(work):
            key = (job.dtype, job.device)
            if key not in ceilings:
                show(f"{job}: ceilings", done)
                ceilings[key] = rooflines.Ceilings.measure(*key)
            share = (end - time.perf_counter()) / (len(work) - done)
            found = rooflines.measure(job, built[job.model], photographs, ceilings[key], share,
                                      lambda what, part, done=done: show(what, done + part))  # type: ignore[misc]
            sheet.add([layer.row for layer in found])
            console.out.print(layer_table(job, found, ceilings[key]))
    console.say(f"{len(sheet.record.rows)} rows in {sheet.path}", quiet)


class _Sheet:
    """The results file, written after every group. Groups that this run does not measure are kept.

    Earlier results from another machine or other versions are set aside as bench.previous.json.
    """

    def __init__(self, path: Path, record: results.Results) -> None:
        self.path, self.record = path, record
        if not path.exists():
            return
        before = results.load(path)
        if all(before.environment.get(key) == record.environment.get(key) for key in SAME) \
                and before.commit == record.commit:
            record.rows = before.rows
        else:
            results.save(before, path.with_name("bench.previous.json"))

    def add(self, rows: list[results.Row]) -> None:
        groups = {(row.level, row.group) for row in rows}
        self.record.rows = [row for row in self.record.rows if (row.level, row.group) not in groups] + rows
        results.save(self.record, self.path)


def table(group: session.Group) -> Table:
    """One job's rows; launches as the profiler counted them; what was left out and why below."""
    notes = ["a row with a graph: x the best eager row with a graph"] if any(row.graph for row in group.rows) else []
    shown = Table(title=f"{group.job}  ({group.rounds} rounds)", title_justify="left", title_style="bold",
                  caption="\n".join([*(f"{name}: {why}" for name, why in group.left_out.items()), *notes]) or None,
                  caption_justify="left")
    shown.add_column("provider")
    training = group.job.mode == "training"
    for head in ("ms p50", "p20 .. p80", "images/s", "x best eager", "error", "of peak", "MB",
                 *["saved MB"] * training):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("launches", overflow="fold")
    for entry in sorted(group.entries, key=lambda entry: entry.row.ms_p50 or float("inf")):
        row = entry.row
        style = "bold green" if entry.provider.ours and row.status == "ok" else "red" if row.status != "ok" else None
        if row.ms_p50 is None:
            shown.add_row(row.label, row.status, "", "", "", _number(row.rel_error, ".1e"), "", "", *[""] * training,
                          row.reason, style=style)
            continue
        shown.add_row(row.label + (f" ({row.backend})" if row.backend else ""), _number(row.ms_p50, ".4g"),
                      f"{row.ms_p20:.4g} .. {row.ms_p80:.4g}", _number(row.images_per_s, ".1f"),
                      _number(row.vs_stock, ".2f"), _number(row.rel_error, ".1e"), _number(row.roofline_share, ".0%"),
                      _number(row.peak_mem_mb, ".0f"), *[_number(row.saved_mb, ".0f")] * training,
                      launches.describe(entry.launches) if entry.launches else "", style=style)
    return shown


def layer_table(job: session.Job, found: list[rooflines.Layer], ceilings: rooflines.Ceilings) -> Table:
    """The launches that take most of a forward first; the floor is what the measured ceilings allow."""
    whole = sum(layer.count * (layer.row.ms_p50 or 0) for layer in found)
    floor = sum(layer.count * layer.floor_ms for layer in found)
    launched = sum(layer.count for layer in found)
    caption = (f"{launched} launches take {whole:.4g} ms one by one, their floors {floor:.4g} ms: {floor / whole:.0%}"
               if found else "nothing was fused")
    shown = Table(title=f"{job}  ({ceilings.gflops:.4g} GFLOP/s, {ceilings.gbytes:.4g} GB/s measured)",
                  title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    shown.add_column("problem", overflow="fold")
    for head in ("count", "ms p50", "p20 .. p80", "of forward", "floor ms", "of roofline"):
        shown.add_column(head, justify="right", no_wrap=True)
    for head in ("bound by", "runs on"):
        shown.add_column(head, overflow="fold")
    for layer in sorted(found, key=lambda layer: -layer.count * (layer.row.ms_p50 or 0)):
        row = layer.row
        name = (row.problem or "").replace(f"-{row.dtype}-{row.device}", "")
        shown.add_row(name, str(layer.count), _number(row.ms_p50, ".4g"), f"{row.ms_p20:.4g} .. {row.ms_p80:.4g}",
                      f"{layer.count * (row.ms_p50 or 0) / whole:.0%}", f"{layer.floor_ms:.4g}",
                      _number(row.roofline_share, ".0%"), layer.bound, layer.tile)
    return shown


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
