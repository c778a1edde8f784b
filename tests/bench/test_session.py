"""Jobs: outputs are compared before anything is timed, one provider's failure is its own, the budget holds."""

import time

import pytest
import torch
from torch import nn

from fused_resnet import models, timing
from fused_resnet import nn as ours
from fused_resnet.bench import providers, session, stock
from fused_resnet.bench.providers import PROVIDERS, Provider
from fused_resnet.bench.session import Job


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0.0)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return models.cifar_resnet(8).eval()


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
