"""What has been measured: the tables that are shipped, and what this machine has learned.

`Cache` keeps self-check verdicts and tuned choices of this user in one JSON file. Readers never fail: a
missing file is empty, a broken or foreign one is left alone, reported once, and replaced by memory for the
life of the process. Writers hold a lock, merge with what another process has written meanwhile, and replace
the file atomically.

`Table` reads `tables/<class of devices>.json`, package data: {"version", "environment", "rows": [{"family",
"problem": its id, "backend", "tile", "ms", "label": "measured"}]}. A row answers for its own problem, and for
similar ones that have none.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fused_resnet.problem import ConvProblem

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: one process at a time, still atomic
    fcntl = None  # type: ignore[assignment]

VERSION = 1
TABLES = Path(__file__).with_name("tables")
TABLE_VERSION = 1
# How far a neighbour may be, in powers of two of pixels, of C and of K: beyond, tiles no longer fill the chip alike.
# A guess until there are rows to judge it by.
NEAR = 1.5
# Activations that cost alike: what is fast with one of a class is fast with the others.
EPILOGUE = {"identity": "none", "relu": "clip", "relu6": "clip", "silu": "curve", "hardswish": "curve"}


class CacheError(ValueError):
    """The cache file exists and is not ours to use; the message says why."""


class Cache:
    """A persistent dict of JSON values, shared by processes and threads.

    Args:
        directory: where the file lives; made at the first write.
    """

    def __init__(self, directory: Path):
        self.path = Path(directory) / "cache.json"
        self._rows: dict[str, Any] | None = None
        self._persistent = True
        self._lock = threading.RLock()

    def read(self) -> dict[str, Any]:
        """The rows of the file as it is now.

        Raises:
            CacheError: the file is no JSON, has another version, or cannot be read.
        """
        try:
            data = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CacheError(f"cannot read the cache file {self.path}: {error}") from error
        if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("rows"), dict):
            raise CacheError(f"the cache file {self.path} is not one of version {VERSION}")
        return data["rows"]

    def get(self, key: str) -> Any:
        with self._lock:
            return self._load().get(key)

    def set(self, key: str, value: Any) -> None:
        with self._lock:
            rows = self._load()
            rows[key] = value
            if not self._persistent:
                return
            try:
                with self._locked():
                    rows = {**self.read(), key: value}
                    self._replace(rows)
            except (CacheError, OSError) as error:
                self._give_up(error)
            self._rows = rows

    def clear(self) -> None:
        """Forgets everything, in memory and on disk."""
        with self._lock:
            self._rows = {}
            self._persistent = True
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()

    def _load(self) -> dict[str, Any]:
        if self._rows is None:
            try:
                self._rows = self.read()
            except CacheError as error:
                self._rows = {}
                self._give_up(error)
        return self._rows

    def _give_up(self, error: Exception) -> None:
        if self._persistent:
            warnings.warn(f"fused_resnet keeps its cache in memory for this process: {error}", stacklevel=3)
        self._persistent = False

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _replace(self, rows: dict[str, Any]) -> None:
        handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"version": VERSION, "rows": rows}, file, indent=1, sort_keys=True)
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


class Table:
    """Measured choices for one class of devices.

    Args:
        rows: as the file holds them; one that is not of that form is left out, all with one warning.
        source: what the warning calls them.
    """

    def __init__(self, rows: Iterable[Any] = (), source: str = "the tuned rows"):
        self._exact: dict[tuple[str, str], dict[str, Any]] = {}
        self._known: dict[tuple[str, tuple[Any, ...]], list[tuple[ConvProblem, dict[str, Any]]]] = {}
        wrong = 0
        for row in rows:
            if not _is_row(row):
                wrong += 1
                continue
            self._exact[row["family"], row["problem"]] = row
            problem = problem_of(row["problem"])
            if problem is not None:
                self._known.setdefault((row["family"], _kind(problem)), []).append((problem, row))
        if wrong:
            warnings.warn(f"fused_resnet ignores {wrong} rows of {source}: not of the form that it writes",
                          stacklevel=3)

    @classmethod
    def load(cls, device_class: str, folder: Path = TABLES) -> Table:
        """The table of `sm_90` and the like; empty where none is shipped, and with a warning where it is broken."""
        path = folder / f"{device_class}.json"
        try:
            data = json.loads(path.read_text())
            if data["version"] != TABLE_VERSION:
                raise ValueError(f"it has version {data['version']!r}, expected {TABLE_VERSION}")
            return cls(list(data["rows"]), str(path))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError, KeyError) as error:
            warnings.warn(f"fused_resnet ignores the table {path}: {type(error).__name__}: {error}", stacklevel=3)
            return cls()

    def exact(self, family: str, problem: ConvProblem) -> dict[str, Any] | None:
        """The row of this very problem, or None."""
        return self._exact.get((family, problem.id))

    def near(self, family: str, problem: ConvProblem) -> list[dict[str, Any]]:
        """Rows of problems that differ in N, P, Q, C or K only, by at most `NEAR`; the nearest first."""
        if not isinstance(problem, ConvProblem):
            return []
        here, found = _place(problem), []
        for other, row in self._known.get((family, _kind(problem)), ()):
            apart = [abs(a - b) for a, b in zip(here, _place(other), strict=True)]
            if max(apart) <= NEAR:
                found.append((sum(apart), row))
        return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def same_tile(one: Any, other: Any) -> bool:
    """Whether two tiles, as dicts, launch alike: they may differ in the note on where they come from."""
    return isinstance(one, dict) and isinstance(other, dict) and {**one, "label": ""} == {**other, "label": ""}


def _is_row(row: Any) -> bool:
    return (isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("family", "problem", "backend"))
            and isinstance(row.get("tile"), dict | None))


def _kind(p: ConvProblem) -> tuple[Any, ...]:
    """What two problems must share for one's kernel and tile to suit the other."""
    return (p.device, p.dtype, p.R, p.S, p.stride, p.dilation, p.groups == 1, p.depthwise, p.residual,
            bool(p.prologue), EPILOGUE[p.activation])


def _place(p: ConvProblem) -> tuple[float, float, float]:
    return math.log2(max(1, p.N * p.P * p.Q)), math.log2(max(1, p.C)), math.log2(max(1, p.K))


_ID = re.compile(
    r"n(?P<N>\d+)c(?P<C>\d+)h(?P<H>\d+)w(?P<W>\d+)k(?P<K>\d+)r(?P<R>\d+)s(?P<S>\d+)"
    r"(?:-(?=[tpd]\d)(?:t(?P<stride>[\dx]+))?(?:p(?P<padding>[\dx]+))?(?:d(?P<dilation>[\dx]+))?)?"
    r"(?:-g(?P<groups>\d+))?-(?P<flags>(?:(?:bias|norm|residual)\+)*)(?P<activation>\w+?)(?:-pre_(?P<prologue>\w+?))?"
    r"-(?P<dtype>\w+?)-(?P<device>\w+?)(?:-pool)?")


def problem_of(name: str) -> ConvProblem | None:
    """The convolution of a `ConvProblem.id` (of a stem's: the one in front of the pool), None for another name."""
    found = _ID.fullmatch(name)
    if found is None or found["activation"] not in EPILOGUE:
        return None

    def pair(field: str, default: int) -> tuple[int, int]:
        first, _, second = (found[field] or str(default)).partition("x")
        return int(first), int(second or first)

    n, h, w, c, k, r, s = (int(found[field]) for field in "NHWCKRS")
    bias, norm, residual = (f"{field}+" in found["flags"] for field in ("bias", "norm", "residual"))
    return ConvProblem(found["device"], found["dtype"], n, h, w, c, k, r, s, pair("stride", 1), pair("padding", 0),
                       pair("dilation", 1), int(found["groups"] or 1), bias, norm, residual, found["activation"],
                       found["prologue"] or "")
