"""Runs jobs in a process of their own, so that a fault or a hang on the device costs that process and not the stage.

A device-side fault makes every later CUDA call of its process fail, and a kernel that waits for itself never returns.
The process that runs jobs sends each row as it comes. Before it runs something that may take it down, a job sends a row
with the status "started"; when nothing follows, that row is written down as failed, a new process takes over, and a
job that can leave a tile out is begun again without it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.sheet import Job, OutOfTime, failure

ATTEMPTS = 4  # of one job: each costs the start of a process


class Worker:
    """A process that runs one job at a time and is replaced when it is lost.

    Args:
        now: the clock.
    """

    def __init__(self, now=time.monotonic) -> None:
        self.now = now
        self._process: Any = None
        self._connection: Any = None

    def run(self, job: Job, limit: float) -> Iterator[dict[str, Any]]:
        """The rows of `job`; what was lost is a row with status "failed".

        Raises:
            OutOfTime: the job was cut off after `limit` seconds, which says nothing about it.
        """
        end = self.now() + limit
        avoid: list[dict[str, Any]] = []
        for _ in range(ATTEMPTS):
            try:
                started, fault = yield from self._attempt(job, avoid, end)
            except OutOfTime:
                self.close()
                raise
            if fault is None:
                return
            self.close()
            yield {**(started or {}), "status": "failed", "detail": fault}
            if started is None or not job.resumable or self.now() + job.seconds > end:
                return
            avoid.append({name: value for name, value in started.items() if name != "status"})

    def _attempt(self, job: Job, avoid: list[dict[str, Any]], end: float) -> Any:
        """Yields rows; returns what was under way and what went wrong, both None at the job's end."""
        started = None
        try:
            connection = self._ready()
            connection.send((job.run, {"avoid": avoid} if job.resumable else {}))
            while True:
                patience = max(0.0, min(job.patience, end - self.now()))
                if not connection.poll(patience):
                    if self.now() >= end:
                        raise OutOfTime
                    return started, f"no answer in {patience:.0f} s; its process was killed"
                row = connection.recv()
                if row is None:
                    return None, None
                if row["status"] == "lost":
                    return started, row["detail"]
                if row["status"] == "started":
                    started = row
                else:
                    started = None
                    yield row
        except (EOFError, OSError):
            self._process.join(5)
            return started, f"its process ended with {self._process.exitcode}"

    def _ready(self) -> Connection:
        if self._process is None or not self._process.is_alive():
            self.close()
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=False)
            self._process.start()
            theirs.close()
        return self._connection

    def close(self) -> None:
        """Kills the process, and those that it started, if there is one."""
        if self._process is None:
            return
        if self._process.is_alive():
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet
                self._process.kill()
            self._process.join(10)
        self._connection.close()
        self._process = self._connection = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(connection: Connection) -> None:
    """The process: a call comes in, its rows go out, None ends them."""
    os.setpgid(0, 0)
    while True:
        try:
            call, arguments = connection.recv()
        except EOFError:
            return
        try:
            for row in call(**arguments):
                if row["status"] == "failed" and lost():
                    raise RuntimeError(row.get("detail") or "failed")
                connection.send(row)
        except Exception as error:
            if reason := lost():
                connection.send({"status": "lost", "detail": f"{failure(error)}; {reason}"})
                os._exit(1)  # tearing down a broken context may hang
            connection.send({"status": "failed", "detail": failure(error)})
        connection.send(None)


def lost() -> str | None:
    """Why the device no longer answers in this process, or None."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"the device was lost: {failure(error)}"
    return None
