"""What the commands share: consoles, progress bars, checks of what the user typed."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fused_resnet import backends, numerics
from fused_resnet.bench import results
from fused_resnet.cli import words

UNBOUNDED = 10_000
PIPE_WIDTH = 150  # a pipe or a log has no width of its own; tables are read there too

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False)


def emit(data: Any) -> None:
    """One JSON object, the only thing that a command with --json writes on stdout."""
    out.print(results.to_text(data), markup=False, soft_wrap=True, highlight=False)


def show(table: Table, spare: Sequence[str] = ()) -> None:
    """Prints a table; where the terminal is too narrow, without the columns that can be spared, in this order."""
    for head in spare:
        if Measurement.get(out, out.options.update(width=UNBOUNDED), table).minimum <= out.width:
            break
        table.columns = [column for column in table.columns if column.header != head]
    out.print(table)


def say(text: str, quiet: bool = False) -> None:
    """A line on stderr, where it disturbs no pipe."""
    if not quiet:
        err.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress(total: float, quiet: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr; yields `show(what, done)`, `done` counted in units of `total`."""
    columns = (SpinnerColumn(), BarColumn(30), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
               TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=err, disable=quiet, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda what, done: bar.update(task, description=what, completed=done)


def split(text: str | None) -> list[str]:
    """`a,b` as a list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbers(text: str, option: str) -> list[int]:
    """`1,8` as a list of positive whole numbers.

    Raises:
        ValueError: something else.
    """
    parts = split(text)
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} takes positive whole numbers separated by commas, got {text!r}")
    return [int(part) for part in parts]


def choices(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    """`fp32,bf16` as a list of allowed words.

    Raises:
        ValueError: another word, or none.
    """
    parts = split(text)
    wrong = [part for part in parts if part not in allowed]
    if wrong or not parts:
        raise ValueError(f"{option} takes {', '.join(allowed)}, got {(wrong or [text])[0]!r}")
    return parts


def device_of(name: str | None) -> str:
    """The device to run on: CUDA where there is one, unless the user names it.

    Raises:
        ValueError: an unknown device, CUDA without a GPU, or a cache file that is broken: the kernels would
            run without their verdicts, and the file would be lost at the next write.
    """
    try:
        backends.cache().read()
    except ValueError as error:
        raise ValueError(f"{error}; move it away, or name another folder in FUSED_RESNET_CACHE_DIR") from error
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in words.DEVICES:
        raise ValueError(f"--device takes {' or '.join(words.DEVICES)}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is visible to PyTorch")
    return name


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of one of `words.TENSORS`.

    Raises:
        ValueError: another name.
    """
    return numerics.DTYPES[choices(name, words.TENSORS, "--dtype")[0]]


def writable(folder: Path) -> Path:
    """Makes the folder and proves that a file can be written, before any work is done.

    Raises:
        ValueError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror or error}") from error
    return folder


def set_threads(count: int | None) -> None:
    """Sets PyTorch's thread count.

    Raises:
        ValueError: not positive.
    """
    if count is not None:
        if count < 1:
            raise ValueError(f"--threads takes a positive number, got {count}")
        torch.set_num_threads(count)
