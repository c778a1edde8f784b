"""Classes that are more than a convolution or a norm: the part fuses where it is torch.nn's, to the letter."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import fused_resnet as fr
from fused_resnet.fusing import plans
from fused_resnet.nn.parts import ConvPart
from tests.fusing.helpers import counts, twice
from tests.fusing.pairs import agreed, pair, same_step, train, trains
from tests.nets import randomize

C = 8
X = torch.randn(2, C, 7, 7, generator=torch.Generator().manual_seed(3))


class CallsBase(nn.BatchNorm2d):
    """A norm with its activation that leaves the norm to its base."""

    def forward(self, x):
        return F.relu(super().forward(x))


class SpeltOut(nn.BatchNorm2d):
    """The same by the functional form, without a look at dimensions."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        return F.relu(F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.1, self.eps))


class Frozen(nn.Module):
    """A frozen norm of no class that anybody knows, with an eps of its own in the middle of its forward."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        var, mean = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = weight * (var + 1e-3).rsqrt()
        return x * scale + (bias - mean * scale)


class WithNorm(nn.Conv2d):
    """A convolution that holds its norm and its activation."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class Methodical(WithNorm):
    def forward(self, x):
        return self.activation(self.norm(self._conv_forward(x, self.weight, self.bias)))


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(C, C, 3, padding=1, bias=False), norm(C)
        self.conv2, self.norm2 = nn.Conv2d(C, C, 3, padding=1, bias=False), norm(C)

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x)))) + x


def detectron(**kwargs):
    return WithNorm(C, C, 3, padding=1, bias=False, norm=nn.BatchNorm2d(C), activation=nn.ReLU(), **kwargs)


FUSED = {
    "timm": (lambda: Residual(BatchNormAct2d), 2),
    "timm, no activation": (lambda: Residual(lambda c: BatchNormAct2d(c, apply_act=False)), 2),
    "timm, silu": (lambda: Residual(lambda c: BatchNormAct2d(c, act_layer=nn.SiLU)), 2),
    "timm, affine": (lambda: Residual(lambda c: BatchNormAct2d(c, affine=False)), 2),
    "timm, frozen": (lambda: Residual(FrozenBatchNormAct2d), 2),
    "base": (lambda: Residual(CallsBase), 2),
    "functional": (lambda: Residual(SpeltOut), 2),
    "frozen": (lambda: Residual(Frozen), 2),
    "convolution": (lambda: nn.Sequential(detectron(), detectron(groups=2)), 2),
    "convolution and norm": (lambda: nn.Sequential(WithNorm(C, C, 1, norm=BatchNormAct2d(C)), nn.Conv2d(C, C, 1)), 1),
    "convolution by method": (lambda: Methodical(C, C, 3, norm=CallsBase(C), activation=nn.Identity()), 1),
}


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_parts_fuse_and_agree(name):
    make, convs = FUSED[name]
    stock = randomize(make()).eval()
    fused = fr.fuse(stock)
    assert counts(fused)[0] == convs, str(fr.report(fused))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        twice(stock, fused, X.contiguous(memory_format=memory_format))
    assert not fr.report(fused).notes
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize("name", FUSED)
def test_exceptions_are_those_of_the_class(name):
    stock = randomize(FUSED[name][0]()).eval()
    fused = fr.fuse(stock)
    for bad in (X[0], X[:, :3], X.double(), X.flatten(2), X[:, :, :0], X[:0]):
        with torch.no_grad():
            found = []
            for model in (stock, fused):
                try:
                    found.append(model(bad.clone()).shape)
                except Exception as error:
                    found.append((type(error), str(error)))
        assert found[0] == found[1]


@pytest.mark.parametrize("name", [name for name in FUSED if "silu" not in name])
@pytest.mark.parametrize("recompute", [False, True])
def test_parts_train_as_stock(name, recompute):
    stock, fused = pair(randomize(FUSED[name][0]()).double(), recompute=recompute)
    for _ in range(3):
        same_step(stock, fused, torch.randn(3, C, 6, 6, dtype=torch.float64).requires_grad_())
    stock.eval(), fused.eval()
    same_step(stock, fused, X.double().requires_grad_())
    agreed(fused)


@pytest.mark.parametrize("norm", [BatchNormAct2d, CallsBase, lambda c: BatchNormAct2d(c, affine=False), Frozen])
def test_norms_with_activations_train_as_branches(norm):
    stock, fused = pair(randomize(Residual(norm)).double())
    same_step(stock, fused, X.double())
    trains(fused, X.double())
    train(stock, fused, X.double(), steps=3)
    counters = [m.num_batches_tracked for m in fused.modules() if isinstance(m, _NormBase)]
    assert all(int(n) == int(counters[0]) > 0 for n in counters)


def other(norm):
    """A forward for BatchNormAct2d's place that is nearly a batch norm."""
    def kind(channels):
        class Nearly(nn.BatchNorm2d):
            def __init__(self):
                super().__init__(channels)
                self.gain, self.calls = nn.Parameter(torch.rand(channels)), 2

        Nearly.forward = norm
        return Nearly()

    return kind


def wrong_eps(self, x):
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, 0.5)


def swapped(self, x):
    return F.batch_norm(x, self.running_var, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


def exchanged(self, x):
    return F.batch_norm(x, self.running_mean, self.running_var, self.bias, self.weight, False, 0.1, self.eps)


def other_gain(self, x):
    return F.batch_norm(x, self.running_mean, self.running_var, self.gain, self.bias, False, 0.1, self.eps)


def scaled(self, x):
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight * 2, self.bias, False, 0.1, self.eps)


def without_shift(self, x):
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, None, False, 0.1, self.eps)


def of_the_batch(self, x):
    return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.1, self.eps)


def of_the_batch_kept(self, x):
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps)


def counts_twice(self, x):
    if self.training:
        self.num_batches_tracked.add_(2)
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)


def other_momentum(self, x):
    if self.training:
        self.num_batches_tracked.add_(1)
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.5, self.eps)


def never_counts(self, x):
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)


def frozen_while_training(self, x):
    if self.training and self.calls == 3:
        return x
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


def asks_twice(self, x):
    out = super(type(self), self).forward(x)
    return out * float(self.eps > 0) + x.dim()


NEARLY = [wrong_eps, swapped, exchanged, other_gain, scaled, without_shift, of_the_batch, of_the_batch_kept,
          counts_twice, other_momentum, never_counts, frozen_while_training, asks_twice]
PLAIN_IN_EVAL = {counts_twice, other_momentum, never_counts, frozen_while_training}


@pytest.mark.parametrize("forward", NEARLY, ids=lambda f: f.__name__)
def test_what_is_nearly_a_batch_norm_is_none(forward):
    stock = randomize(Residual(other(forward))).eval()
    fused = fr.fuse(stock, recompute=False)
    wanted = 2 if forward in PLAIN_IN_EVAL else 0
    patterns = [row.pattern for row in fr.report(fused)]
    assert sum("norm" in p for p in patterns) == wanted or forward is asks_twice, patterns
    with torch.no_grad():
        twice(stock, fused, X)
    stock, fused = pair(randomize(Residual(other(forward))).double())
    for _ in range(3):
        same_step(stock, fused, X.double())
    agreed(fused)


def frozen(expression):
    """A frozen norm whose last line is another; w, b, m, v are its vectors."""
    def kind(channels):
        scope = {"torch": torch}
        lines = ["w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)",
                 "v, m = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)",
                 *expression.split("; ")]
        exec("def forward(self, x):\n    " + "\n    ".join(lines), scope)
        return type("Spelt", (Frozen,), {"forward": scope["forward"]})(channels)

    return kind


EXACT = ["s = w * (v + 1e-5).rsqrt(); return x * s + (b - m * s)",
         "s = w * torch.rsqrt(v + 1e-3); return x * s + (b - m * s)"]
INEXACT = ["s = w * (v + 1e-5).sqrt(); return x * s + (b - m * s)",
           "s = w * (v + 1e-5).rsqrt(); return x * s + (b - m)",
           "s = w * (v + 1e-5).rsqrt(); return x * s + (b + m * s)",
           "s = w * (m + 9.0).rsqrt(); return x * s + (b - v * s)",
           "s = b * (v + 1e-5).rsqrt(); return x * s + (w - m * s)",
           "s = w * (v * 1e-5).rsqrt(); return x * s + (b - m * s)",
           "s = w * (v + 1e-5).rsqrt(); t = w * (v + 1.0).rsqrt(); return x * s + (b - m * t)",
           "s = w * (v + 1e-5).rsqrt(); return x + s * (b - m * s)", "s = w * v.rsqrt(); return x * s + (b - m * s)"]


@pytest.mark.parametrize("expression", EXACT + INEXACT)
@torch.no_grad()
def test_a_frozen_norm_is_read_to_the_letter(expression):
    stock = randomize(Residual(frozen(expression))).eval()
    fused = fr.fuse(stock)
    norms = sum("norm" in row.pattern for row in fr.report(fused))
    assert norms == (2 if expression in EXACT else 0), str(fr.report(fused))
    twice(stock, fused, X)


class OtherStride(WithNorm):
    def forward(self, x):
        return self.norm(F.conv2d(x, self.weight, self.bias, 2, self.padding, self.dilation, self.groups))


class Standardised(WithNorm):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self.norm(F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups))


class Overridden(WithNorm):
    def _conv_forward(self, x, weight, bias):
        return F.conv2d(x, weight.flip(2), bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x):
        return self.norm(self._conv_forward(x, self.weight, self.bias))


class Padded(WithNorm):
    def forward(self, x):
        return self.norm(self._conv_forward(F.pad(x, (1, 1, 1, 1), mode="circular"), self.weight, self.bias))


@pytest.mark.parametrize("kind, convs", [(OtherStride, 0), (Standardised, 0), (Overridden, 0), (Padded, 1)])
@torch.no_grad()
def test_what_is_nearly_a_convolution_is_none(kind, convs):
    stock = randomize(nn.Sequential(kind(C, C, 3, norm=nn.BatchNorm2d(C)))).eval()
    fused = fr.fuse(stock)
    assert counts(fused) == (convs, 1), str(fr.report(fused))
    assert convs or kind.__name__ in fr.report(fused).rows[0].reason
    twice(stock, fused, X)


@torch.no_grad()
def test_circular_padding_stays_stock():
    stock = randomize(WithNorm(C, C, 3, padding=1, padding_mode="circular", norm=nn.BatchNorm2d(C))).eval()
    stock.__class__ = Methodical
    stock.activation = nn.ReLU()
    fused = fr.fuse(stock)
    assert counts(fused) == (0, 1)
    twice(stock, fused, X)


@torch.no_grad()
def test_parts_follow_their_modules():
    """Settings, weights, copies, pickles: a part has no state of its own."""
    stock = randomize(nn.Sequential(Methodical(C, C, 3, padding=1, norm=BatchNormAct2d(C), activation=nn.Identity()),
                                    Residual(BatchNormAct2d))).eval()
    fused = fr.fuse(stock)
    twice(stock, fused, X)
    for model in (stock, fused):
        model[0].weight.mul_(1.5)
        model[1].norm1.running_mean.add_(0.3)
        model[1].norm2.bias.sub_(0.2)
    for again in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        twice(stock, again, X)
        part = plans(again)[""].launches[0].conv
        assert type(part) is ConvPart and part.whole is again[0] and part.__dict__ is again[0].__dict__
        assert not fr.report(again).notes
    loaded = fr.fuse(copy.deepcopy(stock))
    loaded.load_state_dict(fused.state_dict())
    twice(stock, loaded, X)
    for model in (stock, fused):
        model[0].stride = (2, 2)
        model[1].norm1.eps = 0.1
    twice(stock, fused, X)
    assert torch.equal(fr.unfuse(fused)(X), stock(X))


@pytest.mark.parametrize("at", ["0", "0.norm", "1.norm1", "1.norm1.act"])
@torch.no_grad()
def test_hooks_on_wholes_fire(at):
    stock = randomize(nn.Sequential(detectron(), Residual(BatchNormAct2d))).eval()
    fused, seen = fr.fuse(stock), []
    fused.get_submodule(at).register_forward_hook(lambda m, i, o: seen.append(o.clone()))
    twice(stock, fused, X)
    assert len(seen) == 2
