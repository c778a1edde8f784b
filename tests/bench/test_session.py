"""Jobs: outputs are compared before anything is timed, one provider's failure is its own, the budget holds."""

import importlib.util
import time

import pytest
import torch
from torch import nn

from fused_resnet import models, timing
from fused_resnet import nn as ours
from fused_resnet.bench import providers, session, stock
from fused_resnet.bench.providers import PROVIDERS, Provider
from fused_resnet.bench.session import Job
from fused_resnet.cli.work import bench as work
from tests.test_graphs import Fake


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def run(tiny, images, chosen, dtype="fp32", budget=5.0, batch=2):
    work = session.Session({"tiny": tiny}, images, chosen, budget)
    (group,) = work.run([Job("tiny", batch, dtype, "cpu")])
    return group, {row.provider: row for row in group.rows}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_group_holds_complete_rows(tiny, images, dtype):
    chosen = providers.select(["eager", "eager_channels_last", "fused"], "cpu")
    group, rows = run(tiny, images, chosen, dtype)
    assert set(rows) == {"eager", "eager_channels_last", "fused"} and group.rounds >= 3
    for row in rows.values():
        assert row.status == "ok" and row.ms_p20 <= row.ms_p50 <= row.ms_p80
        assert row.images_per_s == pytest.approx(2e3 / row.ms_p50)
        assert row.vs_stock > 0 and row.launches > 0 and row.roofline_share > 0
        assert row.rel_error < {"fp32": 1e-5, "bf16": 0.05}[dtype]
    assert max(row.vs_stock for row in rows.values() if row.provider.startswith("eager")) >= 1.0
    assert rows["fused"].backend == "cpu" and rows["fused"].launches < rows["eager"].launches


def test_models_of_ours_are_timed_as_plain_torch(tiny, images):
    group, _ = run(tiny, images, providers.select(["eager"], "cpu"))
    assert group.entries[0].launches["norm"] == 9


def test_wrong_and_failing_providers_are_shown_and_not_timed(tiny, images):
    def broken(model, sample):
        raise RuntimeError("no such\nluck")

    chosen = [PROVIDERS["eager"], Provider("off", lambda model, sample: lambda x: model(x) + 0.1),
              Provider("nan", lambda model, sample: lambda x: model(x) * float("nan")),
              Provider("broken", broken), Provider("absent", broken, lambda device, dtype: "not here"),
              PROVIDERS["fused"]]
    group, rows = run(tiny, images, chosen)
    assert {name: row.status for name, row in rows.items()} == {
        "eager": "ok", "off": "wrong", "nan": "wrong", "broken": "failed", "fused": "ok"}
    assert rows["off"].ms_p50 is None and rows["off"].rel_error > 0.01 and "allowed" in rows["off"].reason
    assert rows["broken"].reason == "RuntimeError: no such" and rows["broken"].vs_stock is None
    assert group.left_out == {"absent": "not here"}


def test_a_spent_budget_leaves_out_the_slow_builds_only(tiny, images):
    chosen = [PROVIDERS["eager"], Provider("slow", lambda model, sample: model, cost=100.0), PROVIDERS["fused"]]
    started = time.perf_counter()
    group, rows = run(tiny, images, chosen, budget=0.0)
    assert set(rows) == {"eager", "fused"} and group.left_out == {"slow": "the time budget is spent"}
    assert all(row.status == "ok" for row in rows.values()) and time.perf_counter() - started < 10


@pytest.fixture
def recorder(monkeypatch):
    """Graphs that replay on a CPU."""
    fake = Fake()
    monkeypatch.setattr(session, "recorder_for", lambda device: fake)
    return fake


def test_providers_run_with_and_without_a_graph(tiny, images, recorder):
    chosen = [*providers.select(["eager", "eager_channels_last", "fused"], "cpu"),
              Provider("host", lambda model, sample: model, capturable=False)]
    group, _ = run(tiny, images, chosen)
    assert [(row.provider, row.graph) for row in group.rows] == [
        *[(name, graph) for name in ("eager", "eager_channels_last", "fused") for graph in (False, True)],
        ("host", False)]
    assert all(row.status == "ok" and row.ms_p50 > 0 and row.rel_error < 1e-5 for row in group.rows)
    assert recorder.recordings == 3 and len({row.label for row in group.rows}) == 7
    shown = work.table(group)
    assert {name.partition(" (")[0] for name in shown.columns[0].cells} == {row.label for row in group.rows}
    assert shown.caption == "a row with a graph: x the best eager row with a graph"


def test_the_baseline_of_a_graph_is_the_best_eager_graph(tiny, images, recorder, monkeypatch):
    times = {"eager": 8.0, "eager_channels_last": 4.0, "fused": 2.0, "eager + graph": 3.0,
             "eager_channels_last + graph": 6.0, "fused + graph": 1.0}
    monkeypatch.setattr(timing, "measure", lambda calls, inputs, **_: {name: [times[name]] * 3 for name in calls})
    group, _ = run(tiny, images, providers.select(["eager", "eager_channels_last", "fused"], "cpu"))
    assert {row.label: row.vs_stock for row in group.rows} == {
        "eager": 0.5, "eager_channels_last": 1.0, "fused": 2.0, "eager + graph": 1.0,
        "eager_channels_last + graph": 0.5, "fused + graph": 3.0}


def test_a_graph_that_answers_wrongly_or_cannot_be_recorded_is_not_timed(tiny, images, recorder, monkeypatch):
    """A replay that forgot its input gives what the recording gave."""
    honest = recorder.record

    def stale(call, warmup):
        return honest(call, warmup)[0], lambda: None

    monkeypatch.setattr(recorder, "record", stale)
    group, _ = run(tiny, images, [PROVIDERS["eager"]])
    assert [(row.label, row.status) for row in group.rows] == [("eager", "ok"), ("eager + graph", "wrong")]
    assert group.rows[1].ms_p50 is None and group.rows[1].launches is None and "allowed" in group.rows[1].reason

    def refuse(call, warmup):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "record", refuse)
    group, _ = run(tiny, images, [PROVIDERS["eager"]])
    assert [(row.label, row.status) for row in group.rows] == [("eager", "ok"), ("eager + graph", "failed")]
    assert "not permitted" in group.rows[1].reason and group.rows[1].rel_error is None


def test_the_output_of_a_compilers_own_graph_is_what_is_compared(tiny, images, monkeypatch):
    """torch.compile's graphs replay from the third call on: wrong results of a replay must be seen."""
    calls = []

    def build(model, sample):
        def call(x):
            calls.append(1)
            return model(x) + (len(calls) > 2)

        return call

    provider = Provider("late", build, capturable=False, own_graphs=True)
    job = Job("tiny", 2, "fp32", "cuda")
    work = session.Inference(Job("tiny", 2, "fp32", "cpu"), stock.plain(tiny), images)
    with work.running():
        work.reference()
        entry = session._prepare(job, provider, work)
    assert entry.row.graph and entry.row.status == "wrong" and entry.call is None


def test_the_most_valuable_jobs_come_first():
    found = [str(job) for job in session.jobs(["a", "b"], [1, 8], ["fp32", "bf16"], ["cpu"])]
    assert found[:2] == ["a fp32 batch 8 cpu", "b fp32 batch 8 cpu"] and found[-1] == "b bf16 batch 1 cpu"
    assert len(set(found)) == 8


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_peers_answer_what_stock_answers(tiny, images, name):
    if PROVIDERS[name].reason("cpu", "fp32"):
        pytest.skip(PROVIDERS[name].reason("cpu", "fp32"))
    _, rows = run(tiny, images, [PROVIDERS["eager"], PROVIDERS[name]])
    assert rows[name].status == "ok", rows[name].reason


def test_compiled_providers_answer_what_stock_answers(tiny, images):
    if PROVIDERS["compile"].reason("cpu", "fp32"):
        pytest.skip(PROVIDERS["compile"].reason("cpu", "fp32"))
    _, rows = run(tiny, images, [PROVIDERS["eager"], PROVIDERS["inductor_freezing"]], budget=60.0)
    assert rows["inductor_freezing"].status == "ok", rows["inductor_freezing"].reason


def test_reasons_are_given_where_a_provider_cannot_run():
    assert "bf16" in (PROVIDERS["onnxruntime"].reason("cpu", "bf16") or "bf16")
    assert PROVIDERS["tensorrt"].reason("cpu", "fp32") == "runs on CUDA only"
    if importlib.util.find_spec("tensorrt") is None:
        assert PROVIDERS["tensorrt"].reason("cuda", "fp32") == "not installed: tensorrt (pip install tensorrt)"
    assert PROVIDERS["fused_cudnn"].reason("cpu", "fp32") == "backend cudnn does not run on cpu"
    with pytest.raises(ValueError, match="unknown provider 'eagre'"):
        providers.select(["eagre"], "cpu")


def test_plain_models_are_torchvisions_bit_for_bit():
    zoo = pytest.importorskip("torchvision").models
    x = torch.randn(2, 3, 32, 32)
    for name in ("resnet18", "resnext50_32x4d"):
        model = stock.plain(getattr(models, name)()).eval()
        twin = getattr(zoo, name)().eval()
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(model(x), twin(x))


def test_plain_refuses_a_block_that_it_does_not_know():
    assert type(stock.plain(nn.ReLU())) is nn.ReLU
    with pytest.raises(ValueError, match="no plain twin for 0, a PreActBlock"):
        stock.plain(nn.Sequential(ours.PreActBlock(4, 4)))


@torch.no_grad()
def test_freezing_is_in_effect_beside_plain_compile(tiny, images):
    """Inductor packs constant weights for oneDNN, and neither callable runs the other's code."""
    if PROVIDERS["compile"].reason("cpu", "fp32"):
        pytest.skip(PROVIDERS["compile"].reason("cpu", "fp32"))
    providers.forget_compiled()
    model, sample = stock.plain(tiny), providers.channels_last(images[:2])
    frozen = PROVIDERS["inductor_freezing"].build(model, sample)
    compiled = PROVIDERS["compile"].build(model, sample)
    for _ in range(2):
        assert "mkldnn::_convolution_pointwise" in profiled(lambda: frozen(sample))
        assert "mkldnn::_convolution_pointwise" not in profiled(lambda: compiled(sample))


def profiled(call):
    """The names of everything that the profiler sees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        call()
    return {event.key for event in recorded.key_averages()}


def test_quantised_providers_have_rows_of_their_own():
    """Beside eager ones, whose fp32 is the yardstick; no row of another dtype has them."""
    names = {dtype: {p.name for p in providers.select(None, "cpu") if p.takes(dtype)} for dtype in ("fp32", "int8")}
    quantised = {"fused_int8", "onnxruntime_int8", "openvino_int8"}
    assert names["int8"] == {"eager", "eager_channels_last", *quantised} and not names["fp32"] & quantised
    assert providers.PROVIDERS["fused_int8"].reason("cuda", "int8")
    assert not session.jobs(["m"], [8], ["int8"], ["cpu"], ["training"])
