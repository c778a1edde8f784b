"""Every network of the ResNet family that people load: what fuses, and that nothing else changes."""

import gc
import resource

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d
from transformers import ResNetBackbone, ResNetConfig, ResNetForImageClassification

import fused_resnet as fr
from fused_resnet import models
from tests import seeds
from tests.fusing.helpers import counts, same_strides, twice
from tests.nets import randomize


class Tail(nn.Module):
    """Reads a Hugging Face output: the tensors only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, return_dict=False)


class DetectronConv(nn.Conv2d):
    """detectron2.layers.Conv2d: norm and activation inside of the convolution's class."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = self._conv_forward(x, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class DetectronBlock(nn.Module):
    """detectron2's BasicBlock with plain convolutions and frozen norms of its own."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = FrozenBatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = FrozenBatchNorm2d(channels)

    def forward(self, x):
        out = F.relu_(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return F.relu_(out)


class PreAct(nn.Module):
    """He et al. 2016: norm and ReLU in front of each convolution."""

    def __init__(self, channels):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + x


def huggingface(depth, layer, **kwargs):
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, depth], layer_type=layer, num_labels=7,
                          **kwargs)
    return Tail(ResNetForImageClassification(config))


def faster_rcnn_body():
    return IntermediateLayerGetter(tv.resnet18(norm_layer=FrozenBatchNorm2d), {"layer2": "0", "layer4": "1"})


def fcn_body():
    return tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=5)


# name -> (model, convolutions fused, convolutions, size of the image)
NETS = {
    "resnet18": (tv.resnet18, 20, 20, 48), "resnet34": (tv.resnet34, 36, 36, 48), "resnet50": (tv.resnet50, 53, 53, 48),
    "resnet101": (tv.resnet101, 104, 104, 33), "resnet152": (tv.resnet152, 155, 155, 33),
    "resnext50": (tv.resnext50_32x4d, 53, 53, 33), "resnext101": (tv.resnext101_32x8d, 104, 104, 33),
    "wide_resnet50": (tv.wide_resnet50_2, 53, 53, 33),
    "dilated": (lambda: tv.resnet50(replace_stride_with_dilation=[False, True, True]), 53, 53, 48),
    "frozen": (lambda: tv.resnet50(norm_layer=FrozenBatchNorm2d), 53, 53, 48),
    "group_norm": (lambda: tv.resnet18(norm_layer=lambda c: nn.GroupNorm(4, c)), 0, 20, 32),
    "zero_init": (lambda: tv.resnet18(zero_init_residual=True), 20, 20, 32),
    "faster_rcnn_body": (faster_rcnn_body, 20, 20, 64), "fcn": (fcn_body, 54, 55, 48),
    "hf_basic": (lambda: huggingface(2, "basic"), 8, 8, 48),
    "hf_bottleneck": (lambda: huggingface(2, "bottleneck"), 11, 11, 48),
    "hf_downsample_in_bottleneck": (lambda: huggingface(2, "bottleneck", downsample_in_bottleneck=True), 11, 11, 48),
    "hf_first_stage": (lambda: huggingface(1, "basic", downsample_in_first_stage=True), 7, 7, 48),
    "timm_resnet18": (lambda: timm.create_model("resnet18"), 20, 20, 48),
    "timm_resnet50d": (lambda: timm.create_model("resnet50d"), 55, 55, 48),
    "timm_resnext50": (lambda: timm.create_model("resnext50_32x4d"), 53, 53, 33),
    "timm_seresnet50": (lambda: timm.create_model("seresnet50"), 69, 85, 48),
    "timm_resnet10t": (lambda: timm.create_model("resnet10t"), 14, 14, 40),
    "timm_resnetv2": (lambda: timm.create_model("resnetv2_18"), 16, 21, 48),
    "timm_resnext26ts": (lambda: timm.create_model("resnext26ts"), 31, 31, 40),
    "timm_cspresnet": (lambda: timm.create_model("cspresnet50"), 55, 55, 40),
    "timm_skresnet": (lambda: timm.create_model("skresnet18"), 36, 44, 40),
    "timm_res2net": (lambda: timm.create_model("res2net50_26w_4s"), 85, 85, 40),
    "timm_drop_path": (lambda: timm.create_model("resnet18", drop_path_rate=0.1), 20, 20, 40),
    "timm_regnety": (lambda: timm.create_model("regnety_002"), 57, 70, 40),
    "tutorial_resnet34": (seeds.ResNet34, 36, 36, 48),
    "ours_resnet18": (models.resnet18, 20, 20, 48), "ours_cifar20": (lambda: models.cifar_resnet(20), 21, 21, 32),
    "conv_norm_activation": (lambda: nn.Sequential(Conv2dNormActivation(3, 8), Conv2dNormActivation(
        8, 8, activation_layer=nn.Hardswish)), 2, 2, 17),
    "preact": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), PreAct(8), PreAct(8), nn.BatchNorm2d(8), nn.ReLU()), 4, 5, 17),
    "detectron": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), DetectronBlock(8)), 3, 3, 17),
    "detectron_conv": (lambda: nn.Sequential(DetectronConv(3, 8, 3, norm=nn.BatchNorm2d(8), activation=nn.ReLU()),
                                             nn.Conv2d(8, 8, 1), nn.ReLU()), 2, 2, 17),
}
LARGE = {"timm_resnetv2", "timm_resnext26ts", "timm_cspresnet", "timm_skresnet", "timm_res2net", "timm_drop_path",
         "timm_regnety", "resnet101", "resnet152", "resnext101", "wide_resnet50", "timm_resnet50d", "timm_resnext50",
         "fcn"}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.gate if n in LARGE else []) for n in NETS])
@torch.no_grad()
def test_networks_fuse_and_agree(name):
    make, fused_convs, convs, size = NETS[name]
    stock = randomize(make()).eval()
    before = {key: value.clone() for key, value in stock.state_dict().items()}
    fused = fr.fuse(stock)
    assert counts(fused) == (fused_convs, convs), str(fr.report(fused))
    x = torch.randn(2, 3, size, size)
    for memory_format in FORMATS.values():
        given = x.contiguous(memory_format=memory_format)
        twice(stock, fused, given)
    verdict = fr.verify(stock, fused, x)
    assert verdict, str(verdict)
    half, fused_half = stock.bfloat16(), fused.bfloat16()
    same_strides(fused_half(x.bfloat16()), half(x.bfloat16()))
    verdict = fr.verify(half, fused_half, x.bfloat16())
    assert verdict, str(verdict)
    after = fr.fuse(make()).state_dict()
    assert list(after) == list(before) == list(fused.state_dict())
    assert not fr.report(fused).notes, fr.report(fused).notes


@pytest.mark.parametrize("name", ["resnet18", "timm_resnet18", "hf_basic"])
@torch.no_grad()
def test_the_state_dict_is_untouched(name):
    stock = randomize(NETS[name][0]()).eval()
    fused = fr.fuse(stock)
    fused(torch.randn(2, 3, 40, 40))
    ours, theirs = fused.state_dict(), stock.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in stock.named_modules()]
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize("name", ["resnet18", "frozen", "hf_bottleneck", "tutorial_resnet34"])
@torch.no_grad()
def test_the_profiler_sees_one_launch_for_each_convolution(name):
    make, convs, _, size = NETS[name]
    fused = fr.fuse(randomize(make()).eval())
    x = torch.randn(1, 3, size, size)
    fused(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(x)
    ops = [event.name for event in profile.events()]
    labels = [name for name in ops if name.startswith("fused_resnet::") and not name.startswith("fused_resnet::_")]
    assert len(labels) == convs and labels[0].removeprefix("fused_resnet::") in dict(fused.named_modules())
    unfused = {"aten::batch_norm", "aten::native_batch_norm", "aten::relu", "aten::relu_", "aten::add", "aten::add_",
               "aten::clamp_min_", "aten::mul", "aten::conv2d", "aten::convolution"}
    assert not unfused.intersection(ops)


@pytest.mark.parametrize("name", seeds.BLOCKS)
@pytest.mark.parametrize("memory_format", FORMATS)
@torch.no_grad()
def test_tutorial_blocks_fuse_and_agree(name, memory_format):
    block, convs = seeds.BLOCKS[name]()
    stock = randomize(block).eval()
    fused = fr.fuse(stock)
    assert counts(fused) == (convs, convs), str(fr.report(fused))
    for size in (14, 9, 1):
        twice(stock, fused, torch.randn(2, 16, size, size).contiguous(memory_format=FORMATS[memory_format]))


@torch.no_grad()
def test_backbone_keeps_what_it_returns():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
                          out_features=["stage1", "stage2"])
    stock = randomize(ResNetBackbone(config)).eval()
    fused = fr.fuse(stock)
    x = torch.randn(1, 3, 32, 32)
    for a, b in zip(fused(x).feature_maps, stock(x).feature_maps, strict=True):
        same_strides(a, b)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert type(fused(x)) is type(stock(x))


@torch.no_grad()
def test_what_a_pyramid_still_needs_is_not_written_over():
    """Faster R-CNN: the pyramid reads every stage, and later stages read them as well."""
    stock = BackboneWithFPN(tv.resnet18(norm_layer=FrozenBatchNorm2d), {f"layer{i}": str(i) for i in (1, 2, 3, 4)},
                            [64, 128, 256, 512], 16, LastLevelMaxPool())
    fused = fr.fuse(randomize(stock).eval())
    assert counts(fused) == (20, 28) and len({type(stock(torch.zeros(1, 3, 64, 64))), dict}) == 2
    stages = []
    for model in (stock, fused):  # hooks let the plans of what is inside run
        model.fpn.register_forward_pre_hook(lambda _, given: stages.append(dict(given[0])))
    x = torch.randn(1, 3, 64, 64)
    twice(stock, fused, x)
    for mine, theirs in ((stages[1], stages[0]), (stages[3], stages[2])):
        assert list(mine) == list(theirs)
        for key in theirs:
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-4, atol=1e-4)
    kept = {key: value.clone() for key, value in fused.body(x).items()}
    first = fused.body(x)
    fused.body(torch.randn_like(x))
    assert all(torch.equal(first[key], kept[key]) for key in kept), "a later call wrote into an earlier one's results"


@torch.no_grad()
def test_a_network_prepared_for_quantization_stays_stock():
    """Observers hang on hooks; they must see what they would see."""
    stock = randomize(tv.quantization.resnet18(weights=None, quantize=False)).eval()
    stock.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    stock = torch.ao.quantization.prepare(stock)
    fused, x = fr.fuse(stock), torch.randn(1, 3, 40, 40)
    assert torch.equal(fused(x), stock(x))
    assert any("hook" in note for note in fr.report(fused).notes), fr.report(fused).notes
    for (name, a), (_, b) in zip(stock.state_dict().items(), fused.state_dict().items(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def test_fuse_and_report_take_less_than_a_second():
    """Of the process's own work, the better of two, so that a busy machine does not matter.

    Not counted: the system's time for the 240 MB of new pages of a copy, 0.08 to 0.99 s on one virtual machine,
    and that Python's collector walks through what other tests left.
    """
    def used() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_utime

    stock, taken, told = tv.resnet152().eval(), [], []
    gc.collect()
    gc.freeze()
    try:
        for _ in range(2):
            start = used()
            fused = fr.fuse(stock)
            taken.append(used() - start)
            start = used()
            str(fr.report(fused))
            told.append(used() - start)
    finally:
        gc.unfreeze()
    assert min(taken) < 1 and min(told) < 1, (taken, told)


@torch.no_grad()
def test_what_follows_pruned_strides_is_read_live():
    """segmentation_models_pytorch changes stride and dilation of convolutions after they were built."""
    stock = randomize(tv.resnet18()).eval()
    fused = fr.fuse(stock)
    for model in (stock, fused):
        for module in model.layer4.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (2, 2)
    twice(stock, fused, torch.randn(1, 3, 40, 40))
    assert not fr.report(fused).notes
