"""Layers: every distinct launch once, its floor from the measured ceilings, rows in the common schema."""

import pytest
import torch

from fused_resnet import fusing, models, native, timing
from fused_resnet.bench import layers, results
from fused_resnet.bench.layers import Ceilings
from fused_resnet.bench.session import Job
from fused_resnet.cli import bench as command
from fused_resnet.cli.work import bench as work
from tests.test_graphs import Fake

CEILINGS = Ceilings(gflops=100.0, gbytes=10.0)
JOB = Job("tiny", 2, "fp32", "cpu")


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return models.cifar_resnet(14).eval()


def measure(tiny, budget=0.0):
    return layers.measure(JOB, tiny, torch.randn(2, 3, 16, 16), CEILINGS, budget)


def test_each_distinct_launch_has_one_row(tiny, tmp_path):
    found = measure(tiny)
    fused = [row for row in fusing.report(fusing.fuse(tiny)) if row.status == "fused"]
    own = native.missing("cpu") is None  # then the classifier is a launch, too
    assert len(fused) == 15 and sum(layer.count for layer in found) == 15 + own
    assert len({layer.row.problem for layer in found}) == len(found) == 11 + own
    for layer in found:
        row = layer.row
        assert row.level == "layer" and row.status == "ok" and row.provider == "fused" and row.backend == "cpu"
        assert row.ms_p20 <= row.ms_p50 <= row.ms_p80 and row.roofline_share == layer.floor_ms / row.ms_p50
        assert "cpu" in layer.tile and not row.graph
    record = results.Results({}, "", [layer.row for layer in found])
    assert len(results.load(results.save(record, tmp_path / "a.json")).rows) == len(found)


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    assert CEILINGS.floor(10**9, 10**7) == (10.0, "compute")
    assert CEILINGS.floor(10**7, 10**9) == (100.0, "memory")


def test_ceilings_are_those_of_the_machine():
    found = Ceilings.measure("fp32", "cpu")
    assert found.gflops > 0.1 and 0.1 < found.gbytes < 1e5


def test_on_a_gpu_one_replay_holds_a_launch_for_each_input(tiny, monkeypatch):
    fake = Fake()
    monkeypatch.setattr(layers, "recorder_for", lambda device: fake)
    monkeypatch.setattr(timing, "pool_size", lambda *_: 4)
    monkeypatch.setattr(timing, "measure", lambda calls, inputs, **_: {name: [call(None) or 8.0] for name, call in
                                                                       calls.items()})
    ran = []
    launch = layers.backends.run
    monkeypatch.setattr(layers.backends, "run", lambda *a: ran.append(a[1]) or launch(*a))
    found = measure(tiny)
    assert fake.recordings == len(found) and {layer.row.ms_p50 for layer in found} == {2.0}
    for layer in found:  # warm-up, recording and one replay; besides what the network ran
        assert sum(problem.id == layer.row.problem for problem in ran) >= 12


def test_on_a_gpu_every_backend_stands_beside_the_choice(tiny, monkeypatch):
    fake = Fake()
    monkeypatch.setattr(layers, "recorder_for", lambda device: fake)
    monkeypatch.setattr(layers, "_rivals", lambda family, problem: ["cuda", "reference"])  # no CUDA here: left out
    times = {"": 8.0, "reference": 12.0}
    monkeypatch.setattr(timing, "measure", lambda calls, inputs, **_: {name: [times[name]] for name in calls})
    found = measure(tiny)
    for layer in found:
        assert list(layer.by_backend) == ["cpu", "reference"] and layer.by_backend["reference"] > layer.row.ms_p50
        assert layer.row.vs_stock == pytest.approx(1.5)
        assert [row.provider for row in layer.rivals] == ["eager_channels_last"]
    table = work.layer_table(JOB, found, CEILINGS)
    assert [column.header for column in table.columns][-2:] == ["cpu ms", "reference ms"]


def test_the_command_writes_rows_beside_those_of_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Ceilings, "measure", classmethod(lambda cls, dtype, device: CEILINGS))
    options = {"model": "cifar_resnet8", "batch": "2", "dtype": "fp32", "device": "cpu", "size": 16, "budget": 0.1,
               "out": tmp_path, "quiet": True}
    assert command.bench(**options, provider="eager") == 0
    assert command.bench(**options, layers=True) == 0
    rows = results.load(tmp_path / "bench.json").rows
    assert [row.level for row in rows].count("model") == 1 and len(rows) > 5
    printed = capsys.readouterr().out
    assert "100 GFLOP/s, 10 GB/s measured" in printed
    assert f"{9 + (native.missing('cpu') is None)} launches take" in printed


def test_an_unfused_model_has_an_empty_table():
    job = Job("none", 1, "fp32", "cpu")
    assert layers.measure(job, torch.nn.Flatten().eval(), torch.randn(1, 3, 4, 4), CEILINGS, 0.0) == []
    assert work.layer_table(job, [], CEILINGS).caption == "nothing was fused"
