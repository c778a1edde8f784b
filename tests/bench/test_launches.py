"""Launches are counted by the profiler, nested operators once."""

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from fused_resnet import fusing, models, native
from fused_resnet.bench import launches
from fused_resnet.bench.stock import plain

STOCK_50 = {"conv": 53, "norm": 53, "activation": 49, "add": 16, "pool": 2, "linear": 1}


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(0)
    return plain(models.resnet50()).eval()


@pytest.fixture(scope="module")
def sample():
    return torch.randn(1, 3, 32, 32)


@torch.no_grad()
def counted(model, x):
    model(x)
    return launches.count(lambda: model(x))


@pytest.mark.parametrize("source", ["plain", "torchvision"])
def test_stock_resnet50_launches_what_its_source_says(resnet50, sample, source):
    model = resnet50
    if source == "torchvision":
        model = pytest.importorskip("torchvision").models.resnet50().eval()
    assert dict(counted(model, sample)) == STOCK_50


def test_fused_resnet50_launches_one_convolution_a_row(resnet50, sample):
    fused = fusing.fuse(resnet50)
    with torch.no_grad():
        fused(sample)  # the first call checks the plan and the kernels, which launches stock as well
    found = counted(fused, sample)
    own = native.missing("cpu") is None  # then the classifier is a convolution of one pixel
    wanted = {**STOCK_50, "norm": 0, "activation": 0, "add": 0, "conv": 53 + own, "linear": 1 - own}
    assert {kind: found[kind] for kind in STOCK_50} == wanted


def test_every_label_of_a_fused_model_ran_fused(resnet50, sample):
    fused = fusing.fuse(resnet50)
    with torch.no_grad():
        fused(sample)
        found = launches.per_label(lambda: fused(sample))
    assert set(found) == {row.name for row in fusing.report(fused)}
    assert all(launches.ran_fused(seen) for seen in found.values())


def test_a_label_under_which_the_norm_ran_is_not_fused():
    conv, norm, x = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), torch.randn(1, 3, 8, 8)

    def run():
        with record_function("fused_resnet::alone"):
            y = conv(x)
        with record_function("fused_resnet::outer"), record_function("fused_resnet::inner"):
            norm(conv(x))
        return y

    with torch.no_grad():
        found = launches.per_label(run)
    assert launches.ran_fused(found["alone"])
    assert not launches.ran_fused(found["inner"]) and not launches.ran_fused(found["outer"])
    assert found["outer"] == found["inner"] == {"conv": 1, "norm": 1}


@pytest.mark.parametrize(("run", "expected"), [
    (lambda x: torch.relu(x).add_(1), {"activation": 1, "add": 1}),
    (lambda x: nn.functional.adaptive_avg_pool2d(nn.functional.max_pool2d(x, 2), 1), {"pool": 2}),
    (lambda x: nn.functional.hardswish(nn.functional.silu(nn.functional.relu6(x))), {"activation": 3}),
    (lambda x: x.flatten(1).view(1, -1).t().unsqueeze(0), {}),
    (lambda x: x.contiguous(memory_format=torch.channels_last) * 2, {"other": 2}),
    (lambda x: torch.ops.mkldnn._convolution_pointwise(x, x[:, :, :1, :1].contiguous(), None, [0, 0], [1, 1], [1, 1], 1,
                                                       "relu", [], ""), {"conv": 1, "other": 1}),
    (lambda x: nn.functional.linear(x, torch.eye(8)), {"linear": 1, "other": 1}),
])
def test_categories(run, expected):
    x = torch.randn(1, 3, 8, 8)
    found = dict(launches.count(lambda: run(x)))
    assert {kind: n for kind, n in found.items() if kind != "other"} == \
        {kind: n for kind, n in expected.items() if kind != "other"}
    assert bool(found.get("other")) == bool(expected.get("other"))


@pytest.mark.parametrize(("name", "kind"), [
    ("aten::conv2d", "conv"), ("mkldnn::_convolution_pointwise.binary", "conv"),
    ("aten::cudnn_convolution_add_relu", "conv"),
    ("aten::cudnn_batch_norm", "norm"), ("aten::native_batch_norm", "norm"), ("aten::relu_", "activation"),
    ("aten::add_", "add"), ("aten::addmm", "linear"), ("aten::max_pool2d_with_indices", "pool"),
    ("aten::copy_", "other"),
    ("aten::empty_strided", None), ("cudaLaunchKernel", None), ("fused_resnet::conv_bn_act", "other")])
def test_names(name, kind):
    assert launches.category(name) == kind


def test_describe_keeps_the_order_of_the_categories():
    assert launches.describe(launches.Counter(add=16, conv=53)) == "53 conv + 16 add"
    assert launches.describe(launches.Counter()) == "none"
