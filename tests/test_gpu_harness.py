"""The loop behind `make gpu`, with work that needs no GPU."""

import json
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import check, ground, layers, sanitize, sheet, tables, targets, tune, ways, whole
from benchmarks.sheet import Job, Sheet, work
from fused_resnet import backends, native, tuner
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


@pytest.mark.parametrize("problem", [cases.TINY[2], cases.STEMS[0]], ids=lambda p: p.id)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_check_itself_runs_on_a_cpu(backend, problem):
    rows = list(check.check_one(problem, backend))
    assert [row["status"] for row in rows] == ["ok" if layers.offered(backend, problem) else "refused"], rows


def test_the_check_runs_a_given_tile():
    problem = cases.TINY[0]
    tile = check.kinds(problem, 90)[0]
    row, = check.check_one(problem, "triton", tile)
    assert row["status"] == "ok", row


def test_the_check_sees_a_kernel_that_writes_nothing(monkeypatch):
    problem = cases.TINY[2]
    monkeypatch.setattr(layers.kernel("cpu"), "forward", lambda p, o: torch.empty_like(o.residual))
    row, = check.check_one(problem, "cpu")
    assert row["status"] == "wrong"


def test_nan_that_a_kernel_swallows_is_seen(monkeypatch):
    problem = cases.TINY[2]
    row, = check.check_not_finite(problem, "triton")
    assert row["status"] == "ok", row
    forward = layers.kernel("triton").forward
    monkeypatch.setattr(layers.kernel("triton"), "forward", lambda p, o: forward(p, o).nan_to_num())
    row, = check.check_not_finite(problem, "triton")
    assert row["status"] == "wrong" and "other places" in row["detail"]


def test_the_rows_of_a_model_are_those_that_the_readme_reads(tmp_path, monkeypatch):
    select = whole.providers.select
    monkeypatch.setattr(whole.providers, "select", lambda names, *rest: select(["eager", "fused"], *rest))
    monkeypatch.setattr(whole, "photographs", lambda count: torch.randn(count, 3, 64, 64))
    group = whole.session.Job("resnet18", 2, "fp32", "cpu")
    out = Sheet.open(tmp_path / "bench.json", {**HERE, "cpu": "Chip", "threads": 1}, "c")
    work([Job({"level": "model"}, lambda: whole.bench_one(group, 1.0))], out, 60, say=lambda _: None)
    assert [(row["provider"], row["status"]) for row in out.rows] == [("eager", "ok"), ("fused", "ok")], out.rows
    assert "| **fused** |" in tables.section([out.path])


@pytest.fixture
def known_ceilings(monkeypatch):
    monkeypatch.setattr(layers, "ceilings", lambda dtype: layers.Ceilings(100.0, 10.0))


def test_a_layer_is_tuned_beside_stock_with_its_share_of_the_roofline(known_ceilings):
    problem = cases.conv(16, 16, 8, n=6)
    rows = list(tune.tune_one(problem, [], 0.5))
    assert next(row["provider"] for row in rows) == "eager_channels_last" and len(rows) > 1
    assert {row["status"] for row in rows} == {"ok"} and sum(row["winner"] for row in rows) == 1
    floor = max(problem.flops / 100, problem.bytes / 10) / 1e6
    assert all(row["roofline_share"] == pytest.approx(floor / row["ms_p50"]) for row in rows)


def test_a_pointwise_layer_with_a_stride_is_not_charged_for_pixels_that_it_skips():
    problem = cases.conv(64, 128, 8, 1, n=2, stride=2)
    assert problem.bytes - layers.moved(problem) == 4 * 2 * 64 * (64 - 16)
    assert layers.moved(cases.conv(64, 128, 8, stride=2)) == cases.conv(64, 128, 8, stride=2).bytes


def test_a_large_batch_repeats_few_pictures():
    problem = cases.conv(16, 16, 5, n=2 * layers.IMAGES + 1, residual=True)
    made = layers.operands(problem)
    assert made.x.shape == (problem.N, 16, 5, 5) and made.x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made.x[:layers.IMAGES], made.x[layers.IMAGES:2 * layers.IMAGES])
    assert torch.equal(made.residual[0], made.residual[-1]) and not torch.equal(made.x[0], made.x[1])


def way(tile, forward):
    return tuner.Candidate("triton", tile, forward)


def test_each_tile_runs_once_by_itself_before_it_is_timed():
    problem = cases.TINY[0]
    given = layers.operands(problem)

    def broken(p, o):
        raise RuntimeError("does not compile")

    def said(candidate, avoid=()):
        steps = ways.proven(candidate, problem, given, avoid)
        rows = []
        while True:
            try:
                rows.append(next(steps)["status"])
            except StopIteration as end:
                return rows, end.value

    assert said(way({"kernel": "ws"}, lambda p, o: None)) == (["started"], True)
    assert said(way({"kernel": "ws"}, broken)) == (["started", "failed"], False)
    assert said(tuner.Candidate("cudnn", None, broken)) == ([], True)
    assert said(tuner.Candidate("cuda", None, broken)) == (["started", "failed"], False)  # a kernel without tiles
    assert said(way({"kernel": "ws"}, broken), [ways.mark(way({"kernel": "ws"}, broken))]) == ([], False)


def test_time_that_runs_out_spares_no_kind_of_tile():
    problem = cases.LAYERS["resnet50"][2][0]._replace(device="cuda", dtype="bf16", N=256)
    tiles = ways.promising(problem, tune.candidates(problem, 90), each=2)
    kinds = [ways.kind_of(asdict(tile)) for tile in tiles[1:]]
    distinct = len(set(kinds))
    assert distinct >= 3 and len(set(kinds[:distinct])) == distinct
    assert all(kinds.count(kind) <= 2 for kind in kinds)
    assert tiles[0] == layers.kernel("triton").pick(problem, 90)


def test_winners_of_tune_reach_the_chooser_and_the_report(monkeypatch):
    monkeypatch.setattr(backends, "device_name", lambda device: "GPU")
    (problem, _), *_ = tune.layers("resnet50", 256, "bf16")[1:]
    tile = asdict(tune.candidates(problem, 90)[0])
    common = {**layers.key(problem, "resnet50", graph=True), "status": "ok", "floor_ms": 0.1, "vs_stock": 2.0}
    rows = [{**common, "provider": "eager_channels_last", "backend": "reference", "tile": None, "ms_p50": 0.4,
             "roofline_share": 0.25, "winner": False},
            {**common, "provider": "fused_triton", "backend": "triton", "tile": tile, "ms_p50": 0.2,
             "roofline_share": 0.5, "winner": True}]
    assert tune.learn(rows) == 1
    assert backends.cache().get(backends.tuned_key("conv_bn_act", problem))["tile"] == tile
    line, = [line for line in tune.report(rows) if line.startswith("<")]
    assert problem.id in line and "50%" in line and "stock 0.4000" in line
    assert any("not measured" in line for line in tune.report(rows))


def ground_row(problem, provider, ms, model="kinds"):
    return {**layers.key(problem, model), "level": "ground", "provider": provider, "status": "ok", "ms_p50": ms,
            "floor_ms": 0.1, "roofline_share": 0.1 / ms}


def test_the_ground_report_names_the_winner_of_each_shape():
    problem = ground.DECISIVE[0]
    rows = [ground_row(problem, "gather", 0.2), ground_row(problem, "box", 0.16), ground_row(problem, "box", 0.3),
            ground_row(problem, "cudnn", 0.24), ground_row(problem, "cudnn conv alone", 0.12, "cudnn"),
            ground_row(problem, "cudnn relu", 0.15, "cudnn"),
            {"level": "ground", "model": "l2", "provider": "L2 reads of 20 MB", "status": "ok", "ms_p50": 1.0,
             "rate": 5.123, "unit": "TB/s"},
            {"level": "ground", "model": "barrier", "provider": "barrier", "status": "failed", "detail": "hung"}]
    text = "\n".join(ground.report(rows))
    assert "-> box by 25%" in text and "-> cudnn relu by 0%" in text
    assert "box 0.1600 (62%)" in text and "5.12 TB/s" in text and "failed: barrier barrier hung" in text


def test_ground_rows_are_never_shipped_as_winners(known_ceilings, monkeypatch):
    problem = cases.conv(16, 16, 6)
    for row in ground.measured(problem, tuner.candidates("conv_bn_act", problem), 0.2):
        assert row["winner"] is False and row["floor_ms"] > 0


def model_row(provider, ms, graph=False, model="resnet50", batch=256, **more):
    return {"level": "model", "model": model, "batch": batch, "dtype": "bf16", "mode": "inference", "status": "ok",
            "provider": provider, "graph": graph, "ms_p50": ms, "images_per_s": batch / ms * 1e3, **more}


def test_targets_say_what_was_met_missed_and_not_measured():
    rows = [model_row("eager_channels_last", 18.0), model_row("compile", 9.5), model_row("fused", 5.6),
            model_row("fused_triton", 8.0, kernels={"conv_gemm": 50, "sm90_xmma_fprop_implicit_gemm_bf16": 3}),
            model_row("fused", 0.53, batch=1), model_row("fused", 0.15, True, batch=1),
            model_row("eager", 1.0, batch=1), model_row("eager_channels_last", 0.2, True, batch=1),
            model_row("fused_cuda", 7.0, kernels={"conv_bn_act_tile": 53})]
    lines = targets.report(rows)
    assert len(lines) == len(targets.TARGETS) + 1
    told = {str(target): line for target, line in zip(targets.TARGETS, lines, strict=False)}
    assert [line.split()[0] for line in told.values()] == [
        "met", "met", "met", "MISSED", "MISSED", "not", "not", "not", "met", "met", "met", "MISSED", "MISSED",
        *["not"] * 4]
    assert lines[4].endswith(": 3") and lines[8].endswith(": 0.15")
    assert lines[11].endswith("stock eager, both without graphs: 1.887") and lines[12].endswith("convolution: 10")
    assert "resnet50 batch 256 images/s 3.2e+04 of 36000" in lines[-1]
    assert targets.report(rows[:3])[-1] == "nothing that was measured fell short"


def test_the_bench_report_prints_rows_kernels_and_targets():
    lines = whole.report([model_row("fused_triton", 8.0, kernels={"conv_gemm": 50}, roofline_share=0.5)])
    assert "32000 images/s 50%" in lines[0] and "ran 50 conv_gemm" in lines[1] and "MISSED" in "\n".join(lines)


def test_models_are_compiled_ahead_with_the_tiles_that_were_tuned(monkeypatch):
    monkeypatch.setattr(backends, "device_name", lambda device: "GPU")
    problem = tune.layers("resnet18", 256, "bf16")[2][0]
    tile = tune.candidates(problem, 90)[3]
    backends.adopt("conv_bn_act", problem, {"backend": "triton", "tile": asdict(tile)})
    ahead = dict(whole.kernels("resnet18", 256, "bf16"))
    assert ahead.pop(problem) == tile and set(ahead.values()) == {None}


@pytest.mark.parametrize(("status", "output", "expected"), [
    (0, "=========     ERROR SUMMARY: 0 errors", "ok"), (9, "========= Invalid write\n========= at conv_gemm", "wrong"),
    (1, "Traceback", "failed"), (None, "", "failed"), (0, "no summary", "failed")])
def test_what_the_sanitizer_says(status, output, expected):
    assert sanitize.verdict(status, output)["status"] == expected


def test_a_sanitizer_that_cannot_run_is_said_to_be_unavailable(monkeypatch):
    monkeypatch.setattr(sanitize.shutil, "which", lambda name, path=None: None)
    assert [row["status"] for row in sanitize.run("memcheck")] == ["refused"]
    monkeypatch.setattr(sanitize.shutil, "which", lambda name, path=None: "tool")
    monkeypatch.setattr(sanitize, "command", lambda arguments, seconds: (1, "Device not supported"))
    row, = sanitize.run("memcheck")
    assert row == {"status": "refused", "detail": "unavailable: Device not supported"}


def test_a_command_that_hangs_ends_with_what_it_started():
    status, output = sanitize.command([sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(99)"],
                                      5)
    assert status is None and output == "begun\n"


def test_the_sanitizer_watches_every_kind_of_tile(monkeypatch):
    monkeypatch.setattr(native, "without_sm90", lambda: None)
    every = list(sanitize.launches(90))
    kinds = {ways.kind_of(asdict(tile)) for backend, _, tile in every if tile and backend == "triton"}
    assert {"gather", "gather swapped", "gather split", "box", "gemm1x1", "grouped", "depthwise"} <= kinds
    assert {str(tile) for backend, _, tile in every if tile and backend == "cuda"} == set(native.CONV_TILES)
    assert {backend for backend, problem, tile in every if tile is None and problem.id.endswith("pool")} == {
        "triton", "cuda"}
    assert {(launch.family, launch.problem.dtype) for _, launch in sanitize.norms()} == {
        (name, dtype) for name in ("bn_act", "bn_act_sums", "bn_act_grad") for dtype in ("bf16", "fp32")}


STAGES = {"check": check.jobs, "tune": tune.jobs, "bench": whole.jobs, "ground": ground.jobs}


@pytest.fixture(scope="module", params=STAGES)
def plan(request):
    return sorted(STAGES[request.param](arch=90), key=lambda job: -job.value)


def test_every_job_has_a_key_of_its_own_and_crosses_to_another_process(plan):
    keys = [json.dumps(job.key, sort_keys=True) for job in plan]
    assert keys and len(set(keys)) == len(keys)
    for job in plan:
        pickle.loads(pickle.dumps(job.run))
        assert json.loads(json.dumps(job.key)) == job.key, "a row read back must be found by its key"


def fits(jobs, count, budget=540):
    return sum(job.seconds for job in jobs[:count]) <= budget - sheet.RESERVE


def of(jobs, **fields):
    return [i for i, job in enumerate(jobs) if all(job.key.get(k) == v for k, v in fields.items())]


def test_the_most_valuable_rows_of_each_stage_fit_one_run():
    checks, tuning, bench, grounds = (sorted(STAGES[s](90), key=lambda j: -j.value)
                                      for s in ("check", "tune", "bench", "ground"))
    assert sum(job.seconds for job in grounds) <= 90
    for model in ("tests/gpu", "compute-sanitizer memcheck", "compute-sanitizer racecheck", "catalogue", "NaN and Inf"):
        assert fits(checks, 1 + of(checks, model=model)[-1]), model
    assert fits(checks, 1 + of(checks, model="resnet50", dtype="bf16")[-1])
    for model, batch in (("resnet50", 256), ("resnet18", 256), ("resnet50", 1), ("resnext50_32x4d", 128)):
        assert fits(tuning, 1 + of(tuning, model=model, batch=batch, dtype="bf16", level="layer",
                                    mode="inference")[-1]), (model, batch)
    for target in targets.TARGETS:
        assert fits(bench, 1 + of(bench, model=target.model, batch=target.batch, dtype="bf16")[0]), target
