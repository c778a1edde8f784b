"""The loop behind `make gpu`, with work that needs no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, sheet, tables
from benchmarks.sheet import DeviceLost, Job, Sheet, work
from fused_resnet import backends
from fused_resnet.testing import cases

HERE = {"gpu": "none", "torch": "1", "sources": "a"}


class Clock:
    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def job(name, clock, value=0.0, seconds=10.0, status="ok"):
    def run():
        clock.time += seconds
        yield {"status": status, "ms_p50": seconds}

    return Job({"level": "layer", "problem": name}, run, value, seconds)


def names(rows):
    return [row["problem"] for row in rows]


def test_most_valuable_first_until_the_budget_is_used(tmp_path):
    clock, out = Clock(), Sheet.open(tmp_path / "x.json", HERE, "c")
    jobs = [job("small", clock, 1), job("large", clock, 3), job("middle", clock, 2)]
    left = work(jobs, out, sheet.RESERVE + 25, now=clock, say=lambda _: None)
    assert names(out.rows) == ["large", "middle"] and [j.key["problem"] for j in left] == ["small"]


def test_a_job_that_does_not_fit_is_passed_over(tmp_path):
    clock, out = Clock(), Sheet.open(tmp_path / "x.json", HERE, "c")
    work([job("long", clock, 2, seconds=99), job("short", clock, 1)], out, sheet.RESERVE + 20, now=clock,
         say=lambda _: None)
    assert names(out.rows) == ["short"]


def test_each_row_is_on_disk_before_the_next_job_runs(tmp_path):
    path, seen = tmp_path / "x.json", []
    out = Sheet.open(path, HERE, "c")

    def run():
        seen.append(len(json.loads(path.read_text())["rows"]))
        yield {"status": "ok"}

    work([Job({"problem": str(i)}, run) for i in range(3)], out, 60, say=lambda _: None)
    assert seen == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"], "a temporary file was left"


def test_a_second_run_skips_what_is_done(tmp_path):
    clock = Clock()
    for _ in range(2):
        out = Sheet.open(tmp_path / "x.json", HERE, "c")
        work([job("a", clock)], out, 60, now=clock, say=lambda _: None)
    assert clock.time == 10.0 and names(out.rows) == ["a"]


def test_rows_of_other_sources_are_kept_aside(tmp_path):
    clock, path = Clock(), tmp_path / "x.json"
    work([job("a", clock)], Sheet.open(path, HERE, "c"), 60, now=clock, say=lambda _: None)
    assert Sheet.open(path, {**HERE, "sources": "b"}, "c").rows == []
    assert names(json.loads((tmp_path / "x.previous.json").read_text())["rows"]) == ["a"]


def test_committed_rows_are_taken_up_when_the_folder_is_empty(tmp_path):
    clock, earlier = Clock(), tmp_path / "committed" / "x.json"
    work([job("a", clock)], Sheet.open(earlier, HERE, "c"), 60, now=clock, say=lambda _: None)
    out = Sheet.open(tmp_path / "out" / "x.json", HERE, "another commit", earlier)
    assert names(out.rows) == ["a"] and (tmp_path / "out" / "x.json").is_file() and earlier.is_file()


def test_a_failure_is_a_row_and_the_rest_goes_on(tmp_path):
    out = Sheet.open(tmp_path / "x.json", HERE, "c")

    def fail():
        raise RuntimeError("out of\nluck")

    work([Job({"problem": "bad"}, fail, 1), Job({"problem": "good"}, lambda: [{"status": "ok"}])], out, 60,
         say=lambda _: None)
    assert [(r["problem"], r["status"]) for r in out.rows] == [("bad", "failed"), ("good", "ok")]
    assert out.rows[0]["detail"] == "RuntimeError: out of luck"


def test_a_lost_device_stops_the_run_with_its_row_written(tmp_path):
    clock, out = Clock(), Sheet.open(tmp_path / "x.json", HERE, "c")

    def alive():
        raise RuntimeError("illegal memory access")

    with pytest.raises(DeviceLost, match="illegal"):
        work([job("bad", clock, status="failed"), job("next", clock)], out, 60, now=clock, alive=alive,
             say=lambda _: None)
    assert names(json.loads((tmp_path / "x.json").read_text())["rows"]) == ["bad"]


def test_a_broken_file_is_reported_and_left_alone(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*x\.json"):
        Sheet.open(path, HERE, "c")
    assert path.read_text() == "{"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--stage", "check", "--out", str(tmp_path / "out")],
                          capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and "CUDA" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_check_itself_runs_on_a_cpu(backend):
    problem = cases.TINY[2]
    rows = list(gpu.check_one(problem, backend))
    assert [row["status"] for row in rows] == ["ok"], rows


def test_the_check_sees_a_kernel_that_writes_nothing(monkeypatch):
    problem = cases.TINY[2]
    kernel = gpu.kernel("cpu")
    monkeypatch.setattr(kernel, "forward", lambda p, o: torch.empty_like(o.residual))
    row, = gpu.check_one(problem, "cpu")
    assert row["status"] == "wrong"


def test_the_rows_of_a_model_are_those_that_the_readme_reads(tmp_path, monkeypatch):
    select = gpu.providers.select
    monkeypatch.setattr(gpu.providers, "select", lambda names, device: select(["eager", "fused"], device))
    monkeypatch.setattr(gpu, "BENCH_SECONDS", 1.0)
    monkeypatch.setattr(gpu, "photographs", lambda count: torch.randn(count, 3, 64, 64))
    group = gpu.session.Job("resnet18", 2, "fp32", "cpu")
    out = Sheet.open(tmp_path / "bench.json", {**HERE, "cpu": "Chip", "threads": 1}, "c")
    work([Job({"level": "model"}, lambda: gpu.bench_one(group))], out, 60, say=lambda _: None)
    assert [(row["provider"], row["status"]) for row in out.rows] == [("eager", "ok"), ("fused", "ok")], out.rows
    assert "| **fused** |" in tables.section([out.path])


def test_the_fastest_tile_wins_and_the_chooser_finds_it(monkeypatch):
    monkeypatch.setattr(gpu.timing, "matmul_peak", lambda dtype, device: 1e6)
    monkeypatch.setattr(backends, "device_name", lambda device: "GPU")
    problem = cases.LAYERS["resnet50"][1][0]._replace(device="cuda", dtype="bf16")
    slow, fast = gpu.candidates(problem, 90)[:2]
    ways = {("eager_channels_last", "stock", None): 4.0, ("fused_triton", "triton", slow): 3.0,
            ("fused_triton", "triton", fast): 2.0}
    rows = list(gpu.layer_rows(problem, [], {way: [ms * gpu.REPEATS] * 3 for way, ms in ways.items()},
                               dict.fromkeys(ways, 0.0)))
    assert [row["ms_p50"] for row in rows] == [4.0, 3.0, 2.0] and [row["vs_stock"] for row in rows] == [1, 4 / 3, 2]
    assert [row["winner"] for row in rows] == [False, False, True]
    assert gpu.learn([{**gpu.key(problem, "resnet50"), **row} for row in rows]) == 1
    assert backends.cache().get(f"tuned conv_bn_act {problem.id} GPU")["tile"] == gpu.asdict(fast)


def test_every_job_has_a_key_of_its_own():
    for stage in (gpu.check_jobs, gpu.tune_jobs, gpu.bench_jobs):
        keys = [tuple(sorted(job.key.items())) for job in stage(arch=90)]
        assert keys and len(set(keys)) == len(keys), stage.__name__
