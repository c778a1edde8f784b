"""Layouts, values and mistakes: strides, NaN and exceptions are those of stock."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.nn import executor
from tests.fusing.helpers import agree, aside, counts, equal, twice
from tests.fusing.nets import Block, X
from tests.nets import randomize


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_values_that_are_not_finite_come_through(stock, fused, value):
    x = X.clone()
    x[0, 3, 0, 0] = value
    a, b = stock.layer1(stock.stem(x)), fused.layer1(fused.stem(x))
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
    assert a.isnan().any() or value == 1e38
    agree(stock, fused, x)


class Normed(nn.Module):
    """A norm in front of a convolution: its vectors are read by a launch, too."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv, self.after = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.after(self.conv(self.bn(x))))


@pytest.mark.parametrize("vector, value", [("running_mean", float("nan")), ("running_var", -1.0),
                                           ("weight", float("inf")), ("bias", float("nan"))])
@torch.no_grad()
def test_norms_in_front_that_are_not_finite_come_through(vector, value):
    stock = randomize(Normed()).eval()
    fused = fr.fuse(stock)
    assert fr.report(fused).rows[0].pattern == "norm+conv+norm+act"
    for given in (1.0, value, 1.0):
        for model in (stock, fused):
            getattr(model.bn, vector)[1] = given
        twice(stock, fused, X)


LAYOUTS = {
    "sliced": lambda x: x[:, :, ::2, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
    "channel_slice": lambda x: torch.cat([x, x], 1)[:, ::2],
    "offset": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x),
    "one_pixel": lambda x: x[:, :, :1, :1],
    "row": lambda x: x[:, :, :1],
    "one_image": lambda x: x[:1],
    "empty": lambda x: x[:0],
    "permuted": lambda x: x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "parameter": lambda x: nn.Parameter(x, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_layout_gets_stocks_strides(stock, fused, layout):
    for s, f in ((stock, fused), (stock.layer1, fused.layer1), (stock.layer2, fused.layer2), (stock.stem, fused.stem)):
        twice(s, f, LAYOUTS[layout](X))


WRONG = {
    "3d": lambda: (X[0],), "5d": lambda: (X[None],), "2d": lambda: (X[0, 0],), "channels": lambda: (X[:, :5],),
    "double": lambda: (X.double(),), "int": lambda: (X.int(),), "complex": lambda: (X.to(torch.complex64),),
    "none": lambda: (None,), "list": lambda: (X.tolist(),), "array": lambda: (X.numpy(),), "nothing": lambda: (),
    "two": lambda: (X, X), "sparse": lambda: (X.to_sparse(),), "meta": lambda: (X.to("meta"),),
    "bf16": lambda: (X.bfloat16(),), "no_rows": lambda: (X[:, :, :0],)}


@pytest.mark.parametrize("wrong", WRONG)
@torch.no_grad()
def test_errors_are_stocks(stock, fused, wrong):
    def outcome(model):
        try:
            out = model(*WRONG[wrong]())
        except Exception as error:
            return type(error), str(error).split("\n")[0]
        return out.shape, out.dtype

    for part in ("", "stem", "layer1", "layer2"):
        assert outcome(fused.get_submodule(part)) == outcome(stock.get_submodule(part))
    agree(stock, fused, X)
    assert not executor.state.stock


@torch.no_grad()
def test_kernel_larger_than_its_input():
    stock = randomize(nn.Sequential(nn.Conv2d(8, 8, 5), nn.BatchNorm2d(8), nn.ReLU())).eval()
    fused = fr.fuse(stock)
    agree(stock, fused, X)
    for model in (stock, fused):
        with pytest.raises(RuntimeError, match=r"Kernel size: \(5 x 5\). Kernel size can't be greater"):
            model(X[:, :, :3, :3])


@torch.no_grad()
def test_stride_of_zero_raises_as_stock_does():
    stock = nn.Sequential(nn.Conv2d(8, 8, 3, stride=0), nn.BatchNorm2d(8)).eval()
    for model in (stock, fr.fuse(stock)):
        with pytest.raises(RuntimeError, match="non-positive stride"):
            model(X)


class Defaults(Block):
    def forward(self, x, scale=1.0, *, shift=0.0):
        return super().forward(x) * scale + shift


def test_keyword_calls_and_defaults(stock, fused):
    torch.testing.assert_close(stock(x=X), fused(x=X), rtol=1e-4, atol=1e-4)
    assert "other arguments" in aside(fused)[0]
    stock = randomize(Defaults()).eval().requires_grad_(False)
    fused = fr.fuse(stock)
    assert counts(fused) == (2, 2)
    twice(stock, fused, X)
    equal(stock, fused, X, 3.0)
    assert torch.equal(stock(X, shift=1.0), fused(X, shift=1.0))


@torch.no_grad()
def test_a_region_of_threads_that_fail_leaves_no_trace(stock, fused):
    for _ in range(2):
        with pytest.raises(RuntimeError):
            fused(X[:, :3])
        assert not executor.state.stock and not executor.state.inside
    twice(stock, fused, X)


CONVS = {
    "bias": nn.Conv2d(8, 6, 3), "groups": nn.Conv2d(8, 8, 3, groups=4), "depthwise": nn.Conv2d(8, 16, 3, groups=8),
    "dilated": nn.Conv2d(8, 5, 3, dilation=2, padding=2), "pairs": nn.Conv2d(8, 5, (1, 3), (2, 1), (0, 1)),
    "one": nn.Conv2d(8, 1, 1), "strided": nn.Conv2d(8, 7, 7, 2, 3)}
STOCK_CONVS = {
    "same": nn.Conv2d(8, 8, 3, padding="same"), "reflect": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")}


@pytest.mark.parametrize("name", [*CONVS, *STOCK_CONVS])
@torch.no_grad()
def test_every_convolution(name):
    conv = copy.deepcopy((CONVS | STOCK_CONVS)[name])
    stock = randomize(nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.SiLU())).eval()
    fused = fr.fuse(stock)
    assert counts(fused)[0] == (name in CONVS), str(fr.report(fused))
    for _ in range(2):
        agree(stock, fused, X)
