"""A results file that grows row by row, and the loop that fills it until the time is used up.

A run that stops, at its budget or in a crash, loses nothing: every row is in the file when the next
one begins, and the next run skips what is there. Rows count as done only for the same sources on the
same device and versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEY = ("level", "model", "problem", "batch", "dtype", "autocast", "device", "mode", "graph", "provider")
# Rows hold for these; a commit that only adds results changes none of them.
IDENTITY = ("gpu", "gpu_capability", "cuda", "cudnn", "torch", "triton", "sources", "native")
RESERVE = 10.0  # seconds kept for the last write and the summary


class OutOfTime(Exception):
    """A job was cut off because the budget is used."""


@dataclass(frozen=True)
class Job:
    """One piece of work that gives rows.

    `key` says which rows are its own: a row with the same fields means that the job is done. `run` returns them
    without those fields; where it crosses to another process, it must be picklable. Larger `value` goes first;
    `seconds` is what it is expected to take; `kernels` are the (problem, tile) pairs that can be compiled ahead.
    After `patience` seconds without a row it counts as hung. A `resumable` one can be begun again after it lost its
    process: `run(avoid=...)` gets the rows that it was at, and leaves them out.
    """

    key: Mapping[str, Any]
    run: Callable[..., Iterable[Mapping[str, Any]]]
    value: float = 0.0
    seconds: float = 5.0
    kernels: tuple[tuple[Any, Any], ...] = ()
    patience: float = 60.0
    resumable: bool = False


@dataclass
class Sheet:
    """`{"environment", "commit", "rows"}` in one JSON file."""

    path: Path
    environment: dict[str, Any]
    commit: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, environment: dict[str, Any], commit: str, earlier: Path | None = None) -> Sheet:
        """Goes on with `path`, else with a copy of `earlier`, where its rows hold for this environment.

        A file whose rows do not hold is kept beside the new one as `<stem>.previous.json`.

        Raises:
            ValueError: `path` is not a results file, or its folder cannot be written.
        """
        sheet = cls(Path(path), environment, commit)
        sheet.rows = rows_for(sheet.path, environment) or (rows_for(earlier, environment) if earlier else [])
        if not sheet.rows and sheet.path.is_file():
            sheet.path.replace(sheet.path.with_suffix(".previous.json"))
        sheet.save()
        return sheet

    def find(self, key: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows that agree with every field of `key`."""
        return [row for row in self.rows if all(row.get(k) == v for k, v in key.items())]

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row, in place of one with the same `KEY` and tile, and writes the file."""
        def name(r: Mapping[str, Any]) -> list[Any]:
            return [r.get(k) for k in (*KEY, "tile")]

        self.rows = [old for old in self.rows if name(old) != name(row)] + [dict(row)]
        self.save()

    def drop(self, key: Mapping[str, Any]) -> None:
        """Takes out the rows that agree with every field of `key`: half of a job is done again as a whole."""
        dropped = self.find(key)
        if dropped:
            self.rows = [row for row in self.rows if row not in dropped]
            self.save()

    def save(self) -> None:
        """Writes the file atomically.

        Raises:
            ValueError: the folder cannot be made or written.
        """
        text = json.dumps({"environment": self.environment, "commit": self.commit, "rows": self.rows}, indent=1)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text + "\n")
            os.replace(temporary, self.path)
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror or error}") from error


def rows_for(path: Path, environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a results file where they hold for this environment, else none.

    Raises:
        ValueError: there is a file and it is not a results file.
    """
    data = _read(path) if path.is_file() else {"environment": {}, "rows": []}
    same = all(data["environment"].get(k) == environment.get(k) for k in IDENTITY)
    return data["rows"] if same else []


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("environment"), dict) \
            or not isinstance(data.get("rows"), list):
        raise ValueError(f"{path} is not a results file: it has no environment or no rows")
    return data


def sources() -> str:
    """Twelve hex digits of everything that decides a figure: the package, the compiled sources, this folder."""
    digest = hashlib.sha256((ROOT / "setup.py").read_bytes())
    for folder in ("fused_resnet", "csrc", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"}:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def pending(jobs: Iterable[Job], sheet: Sheet) -> list[Job]:
    """The jobs without rows in the sheet, most valuable first."""
    return [job for job in sorted(jobs, key=lambda job: -job.value) if not sheet.find(job.key)]


def failure(error: BaseException) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def inline(job: Job, limit: float) -> Iterator[Mapping[str, Any]]:
    """The rows of a job that runs in this process; an exception is a row with status "failed"."""
    try:
        yield from (row for row in job.run() if row["status"] != "started")
    except Exception as error:
        yield {"status": "failed", "detail": failure(error)}


def work(jobs: Iterable[Job], sheet: Sheet, budget: float, *, now: Callable[[], float] = time.monotonic,
         run: Callable[[Job, float], Iterable[Mapping[str, Any]]] = inline,
         say: Callable[[str], None] = print) -> list[Job]:
    """Runs the jobs that are not done, most valuable first, until the budget is nearly used.

    A job that is not expected to fit into what is left is passed over for one that is.

    Args:
        jobs: in any order.
        sheet: receives each row as soon as it is measured.
        budget: seconds.
        now: the clock.
        run: gives a job's rows; raises OutOfTime when they take more than the seconds that are left.
        say: receives one line for each row.

    Returns:
        the jobs for which no time was left.
    """
    end, left = now() + budget - RESERVE, []
    for job in pending(jobs, sheet):
        if now() + job.seconds > end:
            left.append(job)
            continue
        try:
            for row in run(job, end - now()):
                row = {**job.key, **row}
                sheet.add(row)
                say(describe(row))
        except OutOfTime:
            sheet.drop(job.key)
            left.append(job)
    return left


def describe(row: Mapping[str, Any]) -> str:
    """One line: status, what, how fast or why not."""
    name = " ".join(str(row[k]) for k in ("model", "problem", "batch", "dtype", "provider") if row.get(k) is not None)
    name += " + graph" if row.get("graph") and row["level"] == "model" else ""
    tile = row.get("tile")
    figures = ["-".join(map(str, tile.values())) if isinstance(tile, dict) else "",
               f"{row['ms_p50']:.4g} ms" if row.get("ms_p50") else "",
               f"{row['vs_stock']:.3g}x" if row.get("vs_stock") else "", str(row.get("detail") or "")]
    return " ".join([f"{row['status']:8}", name, *filter(None, figures)])
