"""Checkpoints of `fused-resnet train`: written whole or not at all, and taken up only by the run that wrote them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fused_resnet.cli.trainer import Trainer

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def file(folder: Path, way: str, alone: bool) -> Path:
    """checkpoint.pt; of the stock run that goes before a fused one, checkpoint.stock.pt."""
    return folder / ("checkpoint.pt" if alone or way == "fused" else f"checkpoint.{way}.pt")


def write(path: Path, trainer: Trainer, way: str) -> None:
    """Writes model, optimiser, scaler, position and curve; a kill at any moment leaves the file as it was before.

    Raises:
        ValueError: it cannot be written.
    """
    kept = {"state_dict": trainer.net.state_dict(), "model": trainer.recipe.name, "classes": list(trainer.data.classes),
            "data": trainer.data.name, "images": len(trainer.data.train_y), "recipe": asdict(trainer.recipe),
            "way": way, "finished": trainer.done == trainer.epochs * trainer.steps, "trainer": trainer.state()}
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as stream:
            torch.save(kept, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        ValueError: the file cannot be read, or is no checkpoint of a training run.
    """
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read the checkpoint {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(kept, dict) or not {"state_dict", "recipe", "trainer", "way", "finished"} <= set(kept):
        raise ValueError(f"{path} is no checkpoint of fused-resnet train; --from takes weights alone")
    return kept


def resume(path: Path, trainer: Trainer, way: str) -> None:
    """Puts `trainer` where the run that wrote `path` was.

    Raises:
        ValueError: `path` belongs to a run with other options or other data.
    """
    kept = read(path)
    if kept["way"] != way:
        raise ValueError(f"{path} is of a {kept['way']} run, this one is {way}")
    other = trainer.recipe.differences(kept["recipe"])
    if other:
        raise ValueError(f"--resume goes on with the options that the run began with; {'; '.join(other)}")
    if kept["images"] != len(trainer.data.train_y) or kept["classes"] != list(trainer.data.classes):
        raise ValueError(f"{trainer.data.name} has changed since {path} was written: {kept['images']} images of "
                         f"{len(kept['classes'])} classes then, {len(trainer.data.train_y)} of "
                         f"{len(trainer.data.classes)} now")
    trainer.restore(kept["state_dict"], kept["trainer"])


def protect(paths: list[Path]) -> None:
    """Refuses to begin anew where a run was cut off.

    Raises:
        ValueError: one of the files is of an unfinished run.
    """
    for path in paths:
        if path.exists() and not read(path)["finished"]:
            raise ValueError(f"{path} is of an unfinished run: --resume goes on with it; or remove it, or name "
                             "another folder")


@contextlib.contextmanager
def caught() -> Iterator[Callable[[], int]]:
    """Inside, the first SIGTERM or SIGINT is only noted: yields a function that gives its number, or 0.

    A second one does what it would have done.
    """
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        for one in SIGNALS:
            signal.signal(one, before[one])

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])

