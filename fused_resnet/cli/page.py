"""What `inspect` and `bench --layers` know of a model, as a report's page."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fused_resnet import fusing
from fused_resnet.bench import launches, layers, results, session
from fused_resnet.bench.session import Job, logits
from fused_resnet.bench.stock import plain
from fused_resnet.cli import console

SHOWN = ("cpu", "gpu", "cores", "threads", "torch", "triton", "onednn", "cuda", "cudnn", "python", "os")

Counts = dict[str, Counter[str]]  # "stock" and "fused" -> launches of one forward


def target(file: Path | None, option: str = "--html") -> None:
    """Proves that a file can be written, before any work is done.

    Raises:
        ValueError: it cannot.
    """
    if file is not None:
        console.writable(file.parent)
        if file.is_dir():
            raise ValueError(f"{option} takes a file, {file} is a folder")


def counted(stock: nn.Module, fused: nn.Module, x: torch.Tensor, device: str) -> Counts:
    """What one forward of each launches, when both are warm."""
    return {name: launches.count(lambda model=model: logits(model(x)), device=device)  # type: ignore[misc]
            for name, model in (("stock", stock), ("fused", fused))}


def write(file: Path, name: str, report: fusing.Report, counts: Counts, timings: fusing.Timings | None = None) -> None:
    """The page of one model at `file`."""
    found = results.describe_environment()
    environment = {key: found[key] for key in SHOWN if found[key] is not None}
    report.to_html(file, timings, title=name, launches=counts,
                   environment={**environment, "fused_resnet": results.commit() or "installed"})


def of_layers(file: Path, job: Job, model: nn.Module, images: torch.Tensor, found: Sequence[layers.Layer],
              ceilings: layers.Ceilings) -> None:
    """The page of a job whose launches were timed."""
    fused, x = layers.fused_of(job, model, images)
    stock = plain(copy.deepcopy(model)).to(job.device, x.dtype).eval()
    with torch.no_grad(), session.precision(job.dtype):
        for _ in range(2):  # the first run checks the kernels, the second packs what is left
            fused(x)
        stock(x)
        write(file, job.model, fusing.report(fused), counted(stock, fused, x, job.device), timings(found, ceilings))


def timings(found: Sequence[layers.Layer], ceilings: layers.Ceilings) -> fusing.Timings:
    """What was measured, in the page's form."""
    ms = {row.problem: (row.ms_p20, row.ms_p50, row.ms_p80) for layer in found if (row := layer.row).problem}
    return fusing.Timings(ms, ceilings.gflops, ceilings.gbytes)  # type: ignore[arg-type]


def numbered(file: Path, job: Job) -> Path:
    """`file` with the job's name in front of its suffix."""
    return file.with_name(f"{file.stem}-{job.model}-{job.dtype}-{job.batch}{file.suffix}")
