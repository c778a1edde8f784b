"""What this machine has learned: self-check verdicts and tuned choices, in one JSON file.

Readers never fail: a missing file is empty, a broken or foreign one is left alone, reported once,
and replaced by memory for the life of the process. Writers hold a lock, merge with what another
process has written meanwhile, and replace the file atomically.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: one process at a time, still atomic
    fcntl = None  # type: ignore[assignment]

VERSION = 1


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
