"""The tuner: what is measured, what wins, what is kept, and when nothing may be measured."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet import backends, models, native, timing, tuner
from fused_resnet.fusing import plans
from fused_resnet.kernels.cpu import conv_bn_act as onednn
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import conv

FAMILY = family.FAMILY
PROBLEM = conv(16, 16, 6, residual=True)


@dataclass(frozen=True)
class Tile:
    kind: str
    label: str = "heuristic"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A process that knows nothing, timing without pauses."""
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path))
    backends.reset()
    yield tmp_path
    monkeypatch.undo()
    backends.reset()


@pytest.fixture
def tiles(monkeypatch):
    """oneDNN gets tiles: `tiles("good", "wrong")` makes them; "good" are right, the others are what they are called.

    Its own rule names none of them, as in the kernels for a GPU.
    """
    forward = onednn.with_tile({"kernel": "onednn"})

    def with_tile(tile):
        kind = Tile(**tile).kind

        def run(problem, operands):
            if kind == "failing":
                raise RuntimeError("no registers\nleft")
            if kind == "declining":
                return NotImplemented
            if kind == "wrong":
                operands = operands._replace(x=operands.x * 1.01)
            return forward(problem, operands)

        return run

    def make(*kinds):
        monkeypatch.delattr(onednn, "default", raising=False)
        monkeypatch.setattr(onednn, "forward", forward)
        monkeypatch.setattr(onednn, "candidates", lambda problem: [Tile(kind) for kind in kinds])
        monkeypatch.setattr(onednn, "with_tile", with_tile)

    return make


@pytest.fixture
def clock(monkeypatch):
    """`clock(2.0, 1.0)`: the first row takes 2 ms in every round, the second 1 ms, whatever they really take."""
    def measure(calls, pools, **_):
        for name, call in calls.items():
            call(pools[name][0])
        return {name: [measure.times[int(name)]] * 3 for name in calls}

    monkeypatch.setattr(timing, "measure", measure)
    return lambda *times: setattr(measure, "times", times)


def launch(problem=PROBLEM):
    return family.OP(*inputs.arguments(problem, inputs.make(problem)))


def tune(problem=PROBLEM, **options):
    return tuner.tune(FAMILY, problem, inputs.make(problem), **options)


def tuned(folder):
    path = folder / "cache.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    return {key.split()[2]: row for key, row in rows.items() if key.startswith("tuned")}


def own():
    """oneDNN's tile and, where the native library is, ours."""
    return [asdict(tile) for tile in onednn.candidates(PROBLEM)]


def test_every_way_of_a_backend_that_does_not_refuse_is_a_candidate():
    found = [(way.backend, way.tile) for way in tuner.candidates(FAMILY, PROBLEM)]
    assert found == [("reference", None), *(("cpu", tile) for tile in own())]  # no interpreter
    assert own()[0] == {"kernel": "onednn"}
    assert [way.backend for way in tuner.candidates(FAMILY, PROBLEM._replace(dtype="fp64"))] == ["reference"]


def test_a_kernel_without_a_tile_that_fits_is_no_candidate(tiles, monkeypatch):
    def none_fits(problem):
        raise ValueError("no tile fits")

    tiles("good")
    monkeypatch.setattr(onednn, "refuse", lambda problem: None)
    monkeypatch.setattr(onednn, "candidates", none_fits)
    backends.adopt(FAMILY, PROBLEM, {"backend": "cpu", "tile": {"kind": "good"}})
    assert [way.backend for way in tuner.candidates(FAMILY, PROBLEM)] == ["reference"]
    with pytest.warns(UserWarning, match="ignores the tuned row"):
        assert backends.choose(FAMILY, PROBLEM).label == "heuristic"


def test_rows_of_a_measurement():
    shares, operands = [], inputs.make(PROBLEM)
    rows = tuner.measure(FAMILY, PROBLEM, operands, budget=0.2, on_progress=shares.append)
    assert [(row["backend"], row["tile"]) for row in rows] == [("reference", None), *(("cpu", tile) for tile in own())]
    for row in rows:
        assert row["status"] == "ok" and row["rel_error"] < 1e-5
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
    assert rows[0]["vs_stock"] == 1.0 and sum(row["winner"] for row in rows) == 1
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_wrong_failing_and_declining_kernels_are_not_timed(tiles, clock):
    tiles("wrong", "failing", "good", "declining")
    clock(2.0, 0.1, 0.1, 1.0, 0.1)
    rows = tune()
    assert [row["status"] for row in rows] == ["ok", "wrong", "failed", "ok", "failed"]
    assert "max" in rows[1]["detail"] and rows[1]["rel_error"] > 1e-4 and rows[1]["ms_p50"] is None
    assert rows[2]["detail"] == "RuntimeError: no registers left" and "declined" in rows[4]["detail"]
    assert rows[3]["winner"] and rows[3]["vs_stock"] == 2.0
    assert tuner.describe(rows) == "cpu kind=good 1 ms, 2.00 x stock, best of 5 candidates, 1 wrong, 2 failed"


def test_stock_remains_where_nothing_else_is_right(tiles, clock, fresh):
    tiles("wrong", "failing")
    clock(1.0)
    assert tune()[0]["winner"] and tuned(fresh)[PROBLEM.id]["backend"] == "reference"
    assert backends.choose(FAMILY, PROBLEM).name == "reference"


def test_the_winner_is_what_runs_from_now_on(tiles, clock, fresh):
    tiles("good", "fast")
    clock(2.0, 1.5, 1.0)
    tune()
    row = tuned(fresh)[PROBLEM.id]
    assert row["tile"] == {"kind": "fast", "label": "heuristic"} and row["vs_stock"] == 2.0 and row["measured"] == 3
    assert row["cudnn_benchmark"] is False
    for _ in range(2):  # now, and in a later process
        choice = backends.choose(FAMILY, PROBLEM)
        assert (choice.name, choice.label, choice.tile["kind"]) == ("cpu", "tuned", "fast")
        backends.reset()
    assert backends.choose(FAMILY, PROBLEM._replace(N=3)).label == "heuristic"


@pytest.mark.parametrize(("device", "times", "winner"), [
    ("cpu", {"reference": 1.0, "cpu": 0.5}, "cpu"), ("cpu", {"reference": 1.0, "cpu": 1.01}, "cpu"),
    ("cpu", {"reference": 1.0, "cpu": 1.03}, "reference"),
    ("cuda", {"reference": 1.0, "cudnn": 0.99, "triton": 0.985}, "reference"),
    ("cuda", {"reference": 1.0, "cudnn": 0.9, "triton": 0.89}, "cudnn"),
    ("cuda", {"reference": 1.0, "cudnn": 1.1, "triton": 0.9}, "triton"),
    ("cuda", {"reference": 1.0, "triton": 1.2}, "reference"),
    ("cuda", {"reference": 1.0, "triton": 0.99}, "reference")])
def test_what_wins_is_never_slower_than_stock_by_more_than_noise(device, times, winner):
    rows = [{"backend": name, "winner": False} for name in times]
    tuner._rank(rows, {i: [ms * drift for drift in (1.0, 7.0, 1.1)] for i, ms in enumerate(times.values())},
                tuner.ORDER[device])
    assert [row["backend"] for row in rows if row["winner"]] == [winner]
    assert all(row["vs_stock"] > 1 / tuner.NOISE for row in rows if row["winner"])


def test_the_budget_leaves_tiles_out_but_no_backend(tiles, clock):
    tiles("good", "better", "best")
    clock(1.0, 1.0, 1.0, 1.0)
    assert [row["backend"] for row in tune(budget=0.0)] == ["reference", "cpu"]
    assert len(tune(budget=60.0)) == 4


def test_the_ways_to_measure_can_be_given(tiles):
    tiles("good", "better")
    stock, _, better = tuner.candidates(FAMILY, PROBLEM)
    rows = tuner.measure(FAMILY, PROBLEM, inputs.make(PROBLEM), 0.1, ways=[stock, better])
    assert [row["tile"] for row in rows] == [None, {"kind": "better", "label": "heuristic"}]


def test_operands_stay_as_they_are():
    operands = inputs.make(PROBLEM)._replace(reuse=True)
    before = copy.deepcopy(operands)
    tuner.measure(FAMILY, PROBLEM, operands, budget=0.1)
    assert torch.equal(operands.residual, before.residual) and torch.equal(operands.x, before.x)


def test_operands_that_are_not_finite_prove_nothing(fresh, caplog):
    operands = inputs.make(PROBLEM)
    operands.x[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        tuner.measure(FAMILY, PROBLEM, operands)
    with torch.no_grad(), tuner.tuning(), caplog.at_level(logging.INFO, "fused_resnet"):
        for _ in range(2):
            family.OP(*inputs.arguments(PROBLEM, operands))
    assert [r.message for r in caplog.records] == [f"could not tune {FAMILY} {PROBLEM.id}: ValueError: the result is "
                                                   "not finite, nothing can be judged by it"]
    assert not tuned(fresh)


def test_the_first_use_is_measured_once(fresh, caplog):
    expected = launch()
    with torch.no_grad(), tuner.tuning(0.1), caplog.at_level(logging.INFO, "fused_resnet"):
        results = [launch() for _ in range(3)]
        backends.reset()
        launch()  # a later process finds the row
    assert all(torch.allclose(result, expected, atol=1e-5) for result in results)
    assert [r.message.split(":")[0] for r in caplog.records] == [f"tuned {FAMILY} {PROBLEM.id}"]
    assert f"best of {1 + len(own())} candidates" in caplog.records[0].message
    assert list(tuned(fresh)) == [PROBLEM.id]


def test_what_cannot_be_tuned_is_left_alone(fresh, monkeypatch):
    with torch.enable_grad(), tuner.tuning():
        launch()
    with torch.no_grad(), tuner.tuning():
        with backends.use("reference"):
            launch()
        launch(PROBLEM._replace(dtype="fp64"))  # stock only
        monkeypatch.setenv("FUSED_RESNET_BACKEND", "cpu")
        backends.reset()
        launch()
    assert not tuned(fresh)


def test_nothing_is_looked_up_or_measured_during_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(backends, "choose", lambda *_: pytest.fail("chosen"))
    problem = PROBLEM._replace(device="cuda")
    tuner._first_use(FAMILY, problem, inputs.make(problem, device="cpu"), 1.0)


def test_threads_measure_one_after_the_other_and_only_once(fresh, caplog):
    def work():
        with torch.no_grad(), tuner.tuning(0.05):
            launch()

    threads = [threading.Thread(target=work) for _ in range(4)]
    with caplog.at_level(logging.INFO, "fused_resnet"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caplog.records) == 1 and list(tuned(fresh)) == [PROBLEM.id]


def test_recorded_counts_problems():
    with tuner.recorded() as counts:
        launch()
        launch()
        launch(PROBLEM._replace(N=3))
    launch()
    assert counts == {(FAMILY, PROBLEM): 2, (FAMILY, PROBLEM._replace(N=3)): 1}


@pytest.fixture
def small():
    torch.manual_seed(1)
    return models.cifar_resnet(8).eval(), torch.randn(2, 3, 12, 12)


def test_fuse_with_tune_measures_what_the_model_meets(small, fresh):
    stock, x = small
    fused, plain = fr.fuse(stock, tune=0.02), fr.fuse(stock)
    with torch.no_grad(), tuner.recorded() as met:
        expected = plain(x)
        assert not tuned(fresh)
        assert torch.allclose(fused(x), expected, atol=1e-5)
        assert set(tuned(fresh)) == {problem.id for _, problem in met} and len(met) > 5
        before = (fresh / "cache.json").read_text()
        assert torch.allclose(fused(x), expected, atol=1e-5) and (fresh / "cache.json").read_text() == before
        fused(x[:1])
    assert len(tuned(fresh)) == 2 * len(met)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_tune_too(small, fresh, clone):
    stock, x = small
    twin = clone(fr.fuse(stock, tune=0.02))
    with torch.no_grad():
        twin(x)
    assert tuned(fresh)
    assert all(plan.tune == 0 for plan in plans(fr.fuse(twin)).values())


def test_training_and_gradients_tune_nothing(small, fresh):
    stock, x = small
    fused = fr.fuse(stock, tune=0.02)
    fused.train()(x).sum().backward()
    with torch.no_grad():
        fused.train()(x)
    fused.eval()(x).sum().backward()
    fused.requires_grad_(False)(x)
    assert not tuned(fresh)


def test_seconds_are_a_bool_or_a_number():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert {plan.tune for plan in plans(fr.fuse(net, tune=True)).values()} == {tuner.SECONDS}
    with pytest.raises(ValueError, match="tune must be a bool or seconds, got -1"):
        fr.fuse(net, tune=-1)


WORKER = """
import torch
from fused_resnet import fuse, models, timing
timing.PAUSE = 0.0
torch.set_num_threads(1)
with torch.no_grad():
    fuse(models.cifar_resnet(8).eval(), tune=0.02)(torch.randn(2, 3, 12, 12))
"""


def test_two_processes_tune_together(fresh):
    workers = [subprocess.Popen([sys.executable, "-c", WORKER], env=os.environ, stderr=subprocess.PIPE, text=True)
               for _ in range(2)]
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    found = tuned(fresh)
    problems = 9 + (native.missing("cpu") is None)  # the classifier is one where our kernels run it
    assert len(found) == problems and all(row["backend"] in backends.NAMES for row in found.values())
