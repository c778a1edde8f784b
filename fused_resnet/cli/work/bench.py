"""What `fused-resnet bench` does: prepares the models, measures job after job, keeps a results file, prints tables."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from fused_resnet.bench import launches, pictures, plots, providers, results, session
from fused_resnet.bench import layers as rooflines
from fused_resnet.cli import console, models, page, words

CALIBRATION = 16
SPARE = ("MB", "of peak", "launches", "p20 .. p80", "error", "images/s")  # columns that a narrow terminal goes without
LAYER_SPARE = ("bound by", "of forward", "p20 .. p80", "floor ms", "runs on")
SAME = ("cpu", "cores", "threads", "gpu", "cuda", "torch", "input")  # rows of one file share these


def begin(images: Path | None, size: int, weights: Path | None) -> results.Results:
    """A record without rows, of this machine and this input."""
    return results.begin(input=f"{'pictures of ' + str(images) if images else 'scikit-image pictures'}, {size} px",
                         weights=str(weights) if weights else "random, batch norms calibrated on the pictures")


def models_of(specs: list[str], weights: Path | None) -> dict[str, nn.Module]:
    """Name -> stock model.

    Raises:
        ValueError: no model, an unknown one, or one file of weights for several.
    """
    if not specs:
        raise ValueError(f"--model names no model: expected {words.SOURCES}")
    if weights is not None and len(specs) != 1:
        raise ValueError(f"--weights goes with one --model, got {len(specs)}")
    return dict(models.resolve(spec) for spec in specs)


def prepare(built: dict[str, nn.Module], weights: Path | None, photographs: torch.Tensor, quiet: bool) -> None:
    """The user's weights, or random ones with calibrated norms."""
    for name, network in built.items():
        if weights is not None:
            models.load_weights(network, weights)
        else:
            said: list[str] = []
            pictures.calibrate(network, photographs[:CALIBRATION], say=said.append)
            console.say(f"{name}: {said[0]}", quiet)


@dataclass
class Run:
    """One call of the command: what it measures with, where rows go, the files that it wrote besides."""

    built: dict[str, nn.Module]
    photographs: torch.Tensor
    sheet: Sheet
    end: float
    as_json: bool
    quiet: bool
    dark: bool
    files: list[Path] = field(default_factory=list)

    def models(self, work: list[session.Job], chosen: list[providers.Provider]) -> int:
        """Whole models, a table a job; 1 when a fused one is out of tolerance."""
        wrong = 0
        with console.progress(len(work), self.quiet) as show:
            done = 0
            run = session.Session(self.built, self.photographs, chosen, self.end - time.perf_counter(),
                                  lambda what, share: show(what, done + share))
            for group in run.run(work):
                done += 1
                self.sheet.add(group.rows)
                wrong += sum(row.status == "wrong" and row.provider.startswith("fused") for row in group.rows)
                self._show(table(group), SPARE)
        self._drawn(plots.speedups(self.sheet.record, self.sheet.path.with_name("bench.png"), dark=self.dark))
        return 1 if wrong else 0

    def layers(self, work: list[session.Job], html: Path | None) -> int:
        """Single launches, a table and a roofline a job; each dtype's ceilings are measured once."""
        ceilings: dict[tuple[str, str], rooflines.Ceilings] = {}
        with console.progress(len(work), self.quiet) as show:
            for done, job in enumerate(work):
                key = (job.dtype, job.device)
                if key not in ceilings:
                    show(f"{job}: ceilings", done)
                    ceilings[key] = rooflines.Ceilings.measure(*key)
                share = (self.end - time.perf_counter()) / (len(work) - done)
                found = rooflines.measure(job, self.built[job.model], self.photographs, ceilings[key], share,
                                          lambda what, part, done=done: show(what, done + part))  # type: ignore[misc]
                self.sheet.add([row for layer in found for row in (layer.row, *layer.rivals)])
                self._show(layer_table(job, found, ceilings[key]), LAYER_SPARE)
                chart = page.numbered(self.sheet.path.with_name("layers.png"), job)
                self._drawn(plots.roofline(found, ceilings[key], chart, str(job), dark=self.dark))
                if html is not None:
                    file = html if len(work) == 1 else page.numbered(html, job)
                    page.of_layers(file, job, self.built[job.model], self.photographs, found, ceilings[key])
                    self._drawn(file)
        return 0

    def _show(self, shown: Table, spare: tuple[str, ...]) -> None:
        if not self.as_json:
            console.show(shown, spare)

    def _drawn(self, file: Path | None) -> None:
        self.files += [file] if file is not None else []


class Sheet:
    """The results file, written after every group. Groups that this run does not measure are kept.

    Earlier results from another machine or other versions are set aside as bench.previous.json.
    """

    def __init__(self, path: Path, record: results.Results) -> None:
        self.path, self.record = path, record
        self.added: list[results.Row] = []  # by this run
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
        self.added += rows
        results.save(self.record, self.path)


def table(group: session.Group) -> Table:
    """One job's rows; launches as the profiler counted them; what was left out and why below."""
    notes = ["a row with a graph: x the best eager row with a graph"] if any(row.graph for row in group.rows) else []
    shown = Table(title=f"{group.job}  ({group.rounds} rounds)", title_justify="left", title_style="bold",
                  caption="\n".join([*(f"{name}: {why}" for name, why in group.left_out.items()), *notes]) or None,
                  caption_justify="left")
    shown.add_column("provider", overflow="fold", min_width=12)
    training = group.job.mode == "training"
    for head in ("ms p50", "p20 .. p80", "images/s", "x best eager", "error", "of peak", "MB",
                 *["saved MB"] * training):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("launches", overflow="fold", min_width=14)
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
    shown.add_column("problem", overflow="fold", min_width=20)
    for head in ("count", "ms p50", "p20 .. p80", "of forward", "floor ms", "of roofline"):
        shown.add_column(head, justify="right", no_wrap=True)
    for head in ("bound by", "runs on"):
        shown.add_column(head, overflow="fold")
    # On a GPU every backend beside the others.
    beside = list(dict.fromkeys(name for layer in found if layer.rivals for name in sorted(layer.by_backend)))
    for name in beside:
        shown.add_column(f"{name} ms", justify="right", no_wrap=True)
    for layer in sorted(found, key=lambda layer: -layer.count * (layer.row.ms_p50 or 0)):
        row = layer.row
        name = (row.problem or "").replace(f"-{row.dtype}-{row.device}", "")
        shown.add_row(name, str(layer.count), _number(row.ms_p50, ".4g"), f"{row.ms_p20:.4g} .. {row.ms_p80:.4g}",
                      f"{layer.count * (row.ms_p50 or 0) / whole:.0%}", f"{layer.floor_ms:.4g}",
                      _number(row.roofline_share, ".0%"), layer.bound, layer.tile,
                      *(_number(layer.by_backend.get(name), ".4g") for name in beside))
    return shown


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
