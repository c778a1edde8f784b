"""A job that dies, hangs or breaks its device costs its process, and the stage goes on."""

import functools
import json
import os
import time

import pytest

import fake_jobs
from benchmarks import gpu
from benchmarks.isolate import ATTEMPTS, Worker
from benchmarks.sheet import Job, Sheet, work


def job(run, *arguments, **options):
    return Job({"problem": run.__name__}, functools.partial(run, *arguments), **options)


@pytest.fixture
def worker():
    with Worker() as made:
        yield made


def statuses(rows):
    return [(row.get("tile"), row["status"]) for row in rows]


def test_rows_come_back_and_the_process_stays(worker):
    pids = [row["pid"] for _ in range(2) for row in worker.run(job(fake_jobs.process), 60)]
    assert pids[0] == pids[1] != os.getpid()
    assert list(worker.run(job(fake_jobs.rows, {"status": "ok", "n": 1}, {"status": "wrong"}), 60)) == [
        {"status": "ok", "n": 1}, {"status": "wrong"}]


def test_an_exception_is_a_row(worker):
    assert list(worker.run(job(fake_jobs.fail), 60)) == [
        {"status": "ok", "n": 1}, {"status": "failed", "detail": "RuntimeError: out of luck"}]


def test_the_tile_that_took_the_process_down_is_named_and_left_out(worker):
    rows = list(worker.run(job(fake_jobs.die, resumable=True), 120))
    assert statuses(rows) == [(0, "ok"), (1, "failed"), (0, "ok"), (2, "ok")]
    assert rows[1] == {"provider": "p", "tile": 1, "status": "failed", "detail": "its process ended with 7"}


def test_without_a_second_try_the_next_job_has_a_new_process(worker):
    assert statuses(worker.run(job(fake_jobs.die), 60)) == [(0, "ok"), (1, "failed")]
    assert statuses(worker.run(job(fake_jobs.process), 60)) == [(None, "ok")]


def test_a_device_fault_is_told_from_an_error(worker):
    rows = list(worker.run(job(fake_jobs.fault, resumable=True), 120))
    assert statuses(rows) == [(0, "ok"), (1, "failed"), (0, "ok"), (2, "ok")]
    assert rows[1]["detail"].endswith("launch failed; the device was lost: RuntimeError: illegal memory access")


def test_a_hang_is_killed_and_named(worker):
    start = time.monotonic()
    rows = list(worker.run(job(fake_jobs.hang, 300, patience=8), 60))
    assert statuses(rows) == [("deadlock", "failed")] and "no answer in 8 s" in rows[0]["detail"]
    assert time.monotonic() - start < 30
    assert statuses(worker.run(job(fake_jobs.process), 60)) == [(None, "ok")]


def test_a_job_that_the_budget_ends_leaves_no_row_and_is_done_next_time(worker, tmp_path):
    out = Sheet.open(tmp_path / "x.json", {}, "c")
    long = job(fake_jobs.hang, 300, seconds=1)
    left = work([long], out, 18, run=worker.run, say=lambda _: None)
    assert out.rows == [] and left == [long]


def test_a_whole_run_goes_on_after_faults_and_ends_with_its_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu.results, "describe_environment", lambda: {"gpu": "none"})
    jobs = [job(fake_jobs.hang, 300, value=3, patience=5), job(fake_jobs.die, value=2, resumable=True),
            job(fake_jobs.fail, value=1), job(fake_jobs.rows, {"status": "ok"}, value=0)]
    built = {"status": "ok", "seconds": 61.0, "arch": "90a", "detail": ""}
    monkeypatch.setattr(gpu.library, "build", lambda arch, budget: built)
    assert gpu.run_jobs("tune", lambda arch: jobs, 120, tmp_path, lambda rows: [f"{len(rows)} rows"]) == 0
    written = json.loads((tmp_path / "tune.json").read_text())
    found = written["rows"]
    assert written["environment"]["native"] == "ok" and written["environment"]["native_build"] == built
    assert [(row["problem"], row["status"]) for row in found] == [
        ("hang", "failed"), ("die", "failed"), ("die", "ok"), ("die", "ok"), ("fail", "failed"), ("rows", "ok")]
    assert (tmp_path / "tune.txt").read_text() == "the native library for sm_90a: ok, 61 s\n6 rows\n"
    assert "3 fell short; 0 jobs are missing" in capsys.readouterr().out


def test_a_process_that_always_dies_is_given_up():
    class Silent(Worker):
        def _attempt(self, job, avoid, end):
            self.attempts = getattr(self, "attempts", 0) + 1
            return {"tile": self.attempts, "status": "started"}, "died"
            yield

    silent = Silent()
    rows = list(silent.run(job(fake_jobs.rows, resumable=True, seconds=1), 60))
    assert silent.attempts == ATTEMPTS == len(rows)
