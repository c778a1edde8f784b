"""quantize(): what runs on 8 bits, what does not and why, and that nothing goes stale."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet as fr
from fused_resnet import int8, numerics
from fused_resnet.fusing import plans
from fused_resnet.fusing.int8_steps import Int8Launch, Int8Plan, Int8Pool
from fused_resnet.fusing.replay import Replays
from tests import seeds
from tests.nets import randomize

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem with its pool, a block with a projection, a bottleneck, a head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer = nn.Sequential(seeds.ShortcutBlock(8, 16, 2), seeds.Bottleneck(16, 4))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.layer(self.maxpool(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def stock():
    return randomize(Net()).eval()


@pytest.fixture
def quantised(stock):
    return fr.quantize(stock, X)


def steps(model):
    return plans(model)[""].in_int8


@torch.no_grad()
def test_all_convolutions_run_on_8_bits(stock, quantised):
    result, expected = quantised(X), stock(X)
    assert 1e-4 < numerics.measure(result, expected).rel < 0.1
    assert result.dtype is torch.float32 and result.stride() == expected.stride()
    report = fr.report(quantised)
    assert report and all(row.dtype == "int8" and row.reason == "" for row in report) and "int8" in str(report)
    assert all(row.problem.endswith("-int8-cpu") and row.flops for row in report)
    assert type(stock.__dict__.get("forward")) is not Int8Plan  # a copy was made


@torch.no_grad()
def test_values_between_launches_are_uint8(quantised):
    """All but what the head reads: residuals and what a pool makes, too."""
    quantised(X)
    launches = [step for step in steps(quantised) if isinstance(step, Int8Launch)]
    kinds = [(step.solved.residual, step.solved.out) for step in launches]
    assert kinds[-1] == ("uint8", "fp32") and {out for _, out in kinds[:-1]} == {"uint8"}
    assert "uint8" in {residual for residual, _ in kinds[:-1]}
    assert launches[0].of_y.zero == 0 and any(step.of_y and step.of_y.zero > 0 for step in launches)


@torch.no_grad()
def test_a_residual_can_stay_in_fp32(stock):
    fine = fr.quantize(stock, X, residual="fp32")
    fine(X)
    kinds = [(step.solved.residual, step.solved.out) for step in steps(fine) if isinstance(step, Int8Launch)]
    assert "fp32" in {residual for residual, _ in kinds} and ("", "fp32") in kinds
    assert numerics.measure(fine(X), stock(X)).rel < 0.1


class Pooled(nn.Module):
    """Pools of several kinds between convolutions; one whose result is also shown."""

    def __init__(self, show):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.first, self.second, self.show = nn.MaxPool2d(2), nn.MaxPool2d((3, 2), 1), show

    def forward(self, x):
        x = F.relu(self.b(self.first(F.relu(self.a(x)))))
        pooled = self.second(x)
        out = F.relu(self.c(pooled))
        return (out, pooled) if self.show else out


@pytest.mark.parametrize("show", [False, True])
@torch.no_grad()
def test_pools_hand_on_8_bits_to_those_who_read_them(show):
    stock = Pooled(show).eval()
    model = fr.quantize(stock, X)
    pools = [step for step in steps(model) if isinstance(step, Int8Pool)]
    assert len(pools) == (1 if show else 2)
    results, expected = model(X), stock(X)
    for a, b in zip(*(r if show else (r,) for r in (results, expected)), strict=True):
        assert a.dtype is torch.float32 and a.stride() == b.stride() and numerics.measure(a, b).rel < 0.05


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2)
        self.silu, self.plain = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.behind = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.a(x))))
        x = F.relu(self.plain(F.silu(self.silu(x))))
        return F.relu(self.behind(F.relu(self.norm(x + 1))))


@torch.no_grad()
def test_what_stays_in_float_says_why():
    stock = randomize(Odd()).eval()
    model = fr.quantize(stock, X)
    assert numerics.measure(model(X), stock(X)).rel < 0.05
    rows = {row.name: row for row in fr.report(model)}
    assert {name: row.reason for name, row in rows.items() if row.dtype != "int8"} == {
        "grouped": "2 groups", "silu": "silu does not only clamp", "behind": "a norm in front of the convolution"}
    assert rows["grouped"].status == "fused" and rows["a"].dtype == rows["plain"].dtype == "int8"


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@torch.no_grad()
def test_a_method_decides_the_scales(stock, method):
    state = torch.get_rng_state()
    model = fr.quantize(stock, iter([X[:2], (X[2:],)]), method=method)
    assert torch.equal(state, torch.get_rng_state())
    assert numerics.measure(model(X), stock(X)).rel < 0.1
    wide = fr.quantize(stock, X)
    pairs = [(a.of_x.scale, b.of_x.scale) for a, b in zip(steps(model), steps(wide), strict=True)
             if isinstance(a, Int8Launch)]
    same = all(abs(a / b - 1) < 1e-4 for a, b in pairs)  # not quite: kernels depend on the size of the batch
    assert all(a <= b * 1.0001 for a, b in pairs) and same is (method == "minmax")


def test_mistakes_raise(stock):
    for arguments, what in (({"method": "best"}, "best"), ({"residual": "int4"}, "int4")):
        with pytest.raises(ValueError, match=what):
            fr.quantize(stock, X, **arguments)
    with pytest.raises(ValueError, match="at least one batch"):
        fr.quantize(stock, [])
    with pytest.raises(ValueError, match="eval"):
        fr.quantize(stock.train(), X)
    with pytest.raises(ValueError, match="takes an nn"):
        fr.quantize(lambda x: x, X)


def test_training_gradients_and_hooks_run_as_in_stock(stock, quantised):
    torch.testing.assert_close(quantised(X), stock(X))  # gradients are recorded
    with torch.no_grad():
        assert not torch.allclose(quantised(X), stock(X))
        seen = []
        handle = quantised.layer[0].register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(quantised.layer[1](quantised.layer[0](X.repeat(1, 3, 1, 1)[:, :8])),
                                   stock.layer[1](stock.layer[0](X.repeat(1, 3, 1, 1)[:, :8])), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(quantised(X), stock(X), rtol=1e-3, atol=1e-4)
        assert len(seen) == 2
        handle.remove()
    quantised.train()(X).sum().backward()
    stock.train()(X).sum().backward()
    torch.testing.assert_close(quantised.conv1.weight.grad, stock.conv1.weight.grad)


@torch.no_grad()
def test_other_dtypes_and_autocast_run_in_float(stock, quantised):
    quantised(X)
    with torch.autocast("cpu"):
        assert numerics.measure(quantised(X), stock(X)).rel < 0.02
    wide = copy.deepcopy(quantised).double()
    torch.testing.assert_close(wide(X.double()), stock.double()(X.double()))


@torch.no_grad()
def test_nan_and_empty_inputs_run_stock(stock, quantised):
    broken = X.clone()
    broken[0, 0, 0, 0] = torch.nan
    torch.testing.assert_close(quantised(broken), stock(broken), equal_nan=True)
    assert quantised(X[:0]).shape == (0, 10)


@torch.no_grad()
def test_weights_are_quantised_anew_when_they_change(stock, quantised):
    before = quantised(X)
    for model in (stock, quantised):
        model.layer[0].conv1.weight.mul_(-1)
        model.bn1.running_mean.add_(0.3)
    after = quantised(X)
    assert not torch.equal(before, after) and numerics.measure(after, stock(X)).rel < 0.15
    for model in (stock, quantised):
        model.fc.weight.data[0].zero_()
        model.layer[0].conv1.weight.data.copy_(-model.layer[0].conv1.weight)  # PyTorch cannot see it
    fr.refresh(quantised)
    assert numerics.measure(quantised(X), stock(X)).rel < 0.1


@torch.no_grad()
def test_weights_that_are_not_finite_run_in_float(stock, quantised):
    stock.conv1.weight[0, 0, 0, 0] = quantised.conv1.weight[0, 0, 0, 0] = torch.nan
    torch.testing.assert_close(quantised(X), stock(X), equal_nan=True)
    assert quantised(X).isnan().all()


@torch.no_grad()
def test_other_sizes_and_batches_need_no_new_calibration(stock, quantised):
    for x in (X[:1], torch.randn(2, 3, 45, 27), X.contiguous(memory_format=torch.channels_last)):
        assert numerics.measure(quantised(x), stock(x)).rel < 0.15


@torch.no_grad()
def test_copies_pickles_and_unfuse(stock, quantised):
    expected = quantised(X)
    assert torch.equal(copy.deepcopy(quantised)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quantised))(X), expected)
    assert list(quantised.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(fr.unfuse(quantised)(X), stock(X))
    assert fr.quantize(stock, X, inplace=True) is stock
    assert torch.equal(stock(X), expected)


@torch.no_grad()
def test_verify_reports_the_error_and_the_agreement(stock, quantised):
    verdict = fr.verify(stock, quantised, X)
    assert verdict and verdict.dtype == "int8" and verdict.stock.rel < 1e-5 < verdict.fused.rel
    assert verdict.stock_agreement == 1.0 and verdict.agreement is not None and "first class" in str(verdict)
    step = next(s for s in steps(quantised) if isinstance(s, Int8Launch))
    step.of_x = int8.Affine(step.of_x.scale / 8, step.of_x.zero)
    for plan in plans(quantised).values():  # nobody changes steps, so recordings do not look at them
        plan.replays = Replays()
    assert not fr.verify(stock, quantised, X)


@torch.no_grad()
def test_modules_inside_of_what_cannot_be_traced_are_quantised():
    class Untraceable(Net):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    model = fr.quantize(randomize(Untraceable()).eval(), X)
    model(X)
    dtypes = {row.name: row.dtype for row in fr.report(model)}
    assert dtypes["layer.0.conv1"] == "int8" and dtypes["conv1"] == ""


@torch.no_grad()
def test_a_wrong_plan_is_dropped(stock):
    model = fr.quantize(stock, X)
    plans(model)[""].in_int8[1].residual, plans(model)[""].in_int8[2].activation = None, "identity"
    for step in steps(model):
        step.residual = None
    plans(model)[""].checked.clear()
    with pytest.warns(UserWarning, match="disagreed with the stock forward"):
        torch.testing.assert_close(model(X), stock(X))
