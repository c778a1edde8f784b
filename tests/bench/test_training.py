"""Training steps: gradients are compared before anything is timed; bytes kept for backward are counted."""

import copy
import threading
from collections import Counter

import pytest
import torch
from torch import nn

import fused_resnet as fr
from benchmarks import tables
from fused_resnet import backends, models, numerics
from fused_resnet import nn as ours
from fused_resnet.bench import providers, results, session, stock
from fused_resnet.bench.providers import TRAINING, Provider
from fused_resnet.bench.session import Job
from fused_resnet.bench.steps import saved_bytes
from fused_resnet.bench.training import Step, Training
from fused_resnet.cli import bench as command
from fused_resnet.cli.work import bench as work

NAMES = ["eager", "eager_channels_last", "fused", "fused_recompute"]


@pytest.fixture(scope="module")
def images():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def run(model, images, chosen, dtype="fp32", batch=4):
    work = session.Session({"tiny": model}, images, chosen, 5.0)
    (group,) = work.run([Job("tiny", batch, dtype, "cpu", "training")])
    return group, {row.provider: row for row in group.rows}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_group_holds_complete_rows(tiny, images, dtype, tmp_path):
    group, rows = run(tiny, images, providers.select(NAMES, "cpu", "training"), dtype)
    assert list(rows) == NAMES and group.rounds >= 3
    for row in rows.values():
        assert row.status == "ok", row.reason
        assert (row.mode, row.autocast) == ("training", dtype == "bf16")
        assert row.images_per_s == pytest.approx(4e3 / row.ms_p50) and row.launches > 0 and row.roofline_share > 0
        assert 0 < row.rel_error < {"fp32": 1e-4, "bf16": 0.5}[dtype]
    assert rows["fused_recompute"].saved_mb < rows["fused"].saved_mb <= rows["eager"].saved_mb * 1.001
    assert max(row.vs_stock for row in rows.values() if row.provider in results.EAGER) >= 1.0
    path = results.save(results.Results({}, "c", group.rows), tmp_path / "bench.json")
    cast = " autocast" if dtype == "bf16" else ""
    text = tables.section([path])
    assert f"tiny, {dtype}{cast}, batch 4, training:" in text and "saved MB" in text
    assert "saved MB" in [column.header for column in work.table(group).columns]


def test_the_first_gradients_of_stock_are_the_judge(tiny, images):
    """A step that loses a gradient, scales one, or answers NaN is shown as wrong."""
    def scaled(model, sample):
        model.layer3[0].conv1.weight.register_hook(lambda g: g * 1.01)
        return model

    def detached(model, sample):
        model.layer1.register_forward_hook(lambda module, inputs, y: y.detach().requires_grad_())
        return model

    def poisoned(model, sample):
        model.fc.bias.register_hook(lambda g: g * float("nan"))
        return model

    made = {"scaled": scaled, "detached": detached, "poisoned": poisoned}
    chosen = [TRAINING["eager"], *(Provider(name, build, mode="training") for name, build in made.items())]
    _, rows = run(tiny, images, chosen)
    assert {name: row.status for name, row in rows.items()} == {
        "eager": "ok", "scaled": "wrong", "detached": "failed", "poisoned": "wrong"}
    assert rows["scaled"].ms_p50 is None and "allowed" in rows["scaled"].reason


def test_gradients_are_judged_each_by_its_own_size():
    torch.manual_seed(0)
    exact = [torch.randn(1000, dtype=torch.float64) * scale for scale in (1.0, 1e-4, 1.0)]

    def near(error):
        return [t + torch.randn_like(t) * error * t.abs().mean() for t in exact]

    assert numerics.check_gradients(near(1e-6), near(1e-6), exact, dtype="fp32").ok
    small = near(1e-6)
    small[1] = exact[1] * 1.001
    assert not numerics.check_gradients(small, near(1e-6), exact, dtype="fp32").ok
    assert numerics.check_gradients([torch.zeros(3)], [torch.full((3,), 1e-9)], [torch.full((3,), 1e-19)],
                                    dtype="fp32").ok, "a gradient that is zero in truth says nothing"


def test_a_step_is_that_of_stock_and_moves_the_weights(tiny, images):
    plain = stock.plain(tiny)
    work = Training(Job("tiny", 4, "fp32", "cpu", "training"), plain, images)
    with work.running():
        step, inputs = work.build(TRAINING["fused"])
        twin = Step(copy.deepcopy(work.model))
        for batch, same in zip(inputs[:3], work.pool, strict=False):
            torch.testing.assert_close(step(batch), twin(same), rtol=1e-4, atol=1e-4)
    for a, b, start in zip(step.model.parameters(), twin.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert not torch.equal(a, start)


def test_a_forced_backend_runs_backward_too_whatever_thread_it_is_in(tiny, monkeypatch):
    """On CUDA autograd has a thread of its own for backward, and what is forced is forced for one thread."""
    small = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    work = Training(Job("tiny", 2, "fp32", "cpu", "training"), stock.plain(tiny), small)
    ran, choose = Counter(), backends.choose

    def watched(family, problem):
        choice = choose(family, problem)
        ran[family, choice.name] += 1
        return choice

    with work.running():
        work.reference()
        step, inputs = work.build(TRAINING["fused_triton"])
        assert (bound := work.judge(step, inputs[0])).ok, bound
        loss = step.loss(inputs[0])
        monkeypatch.setattr(backends, "choose", watched)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert {name for _, name in ran} == {"triton"}
    assert {family for family, _ in ran} >= {"bn_act_sums", "bn_act_grad", "conv_dgrad", "conv_wgrad"}


def test_providers_of_training_and_their_reasons():
    free = [name for name in TRAINING if TRAINING[name].forced is None]
    assert [p.name for p in providers.select(None, "cpu", "training") if p.forced is None] == free
    assert all(p.mode == "training" for p in TRAINING.values())
    assert TRAINING["fused_recompute"].reason("cuda", "bf16") == "fused recomputes by default on CUDA"
    assert [p.name for p in providers.select(["openvino", "eager"], "cpu", "training")] == ["eager"]
    with pytest.raises(ValueError, match="provider 'openvino' does not do training"):
        providers.select(["openvino"], "cpu", "training")
    found = session.jobs(["a"], [1, 8], ["fp16", "bf16"], ["cpu"], ["inference", "training"])
    assert [str(job) for job in found if job.mode == "training"] == ["a bf16 autocast batch 8 cpu training"]


def kept(model, size, batch=4, recompute=None):
    """Bytes of one forward with its loss."""
    model = stock.plain(model) if recompute is None else fr.fuse(stock.plain(model), recompute=recompute)
    x = torch.randn(batch, 3, size, size)
    return saved_bytes(lambda: model.train()(x).square().mean(), model)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_whole_networks_keep_at_most_six_tenths_of_stock(name):
    """Of all, the stem and the head included."""
    model = getattr(models, name)()
    theirs, default, low = kept(model, 64), kept(model, 64, recompute=False), kept(model, 64, recompute=True)
    assert default <= 1.01 * theirs
    assert low <= 0.6 * theirs, f"{low / theirs:.3f}"


@pytest.mark.parametrize(("stride", "planes"), [(1, 64), (1, 16), (2, 16)])
def test_a_bottleneck_keeps_at_most_six_tenths_of_stock(stride, planes):
    shortcut = None
    if planes != 16 or stride != 1:
        shortcut = nn.Sequential(nn.Conv2d(64, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))
    block = ours.Bottleneck(64, planes, stride, shortcut).train()
    plain = copy.deepcopy(block)
    plain.__class__ = stock.PLAIN[ours.Bottleneck]
    x = torch.randn(2, 64, 16, 16, requires_grad=True)
    block.recompute = True
    # The input is kept by the block before as well, as its output.
    mine, theirs = (saved_bytes(lambda net=net: net(x), net) - x.nbytes for net in (block, plain))
    assert mine <= 0.6 * theirs, f"{mine / theirs:.3f}"


def test_bytes_that_are_kept_twice_count_once():
    x = torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: (x.exp() * 2, x.t() @ x)) == 2 * x.nbytes


def test_the_command_measures_both_modes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": "cifar_resnet20", "batch": "4", "dtype": "fp32", "device": "cpu", "size": 32, "budget": 1.0,
                 "provider": "eager,fused", "out": tmp_path, "quiet": True, "threads": 1}
    assert command.bench(mode="all", weights=None, images=None, layers=False, **arguments) == 0
    rows = results.load(tmp_path / "bench.json").rows
    assert [(row.mode, row.provider, row.status) for row in rows] == [
        (mode, name, "ok") for mode in ("inference", "training") for name in ("eager", "fused")]
    assert (tmp_path / "bench.png").exists()
    with pytest.raises(ValueError, match="--mode takes inference, training, got 'trainig'"):
        command.bench(mode="trainig", weights=None, images=None, layers=False, **arguments)
    with pytest.raises(ValueError, match="training needs a --batch of 2 or more"):
        command.bench(mode="training", weights=None, images=None, layers=False, **{**arguments, "batch": "1"})
