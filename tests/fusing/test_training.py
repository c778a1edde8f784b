"""fuse() of networks that train: steps of SGD beside stock's, with the branches really run."""


import pytest
import timm
import torch
import torchvision.models as tv
from torch import nn

import fused_resnet as fr
from fused_resnet import models
from fused_resnet.fusing import plans
from tests import seeds
from tests.fusing.pairs import BRANCH, nodes, pair, same_step, sgd, train, trains
from tests.fusing.test_zoo import DetectronBlock, DetectronConv, PreAct, huggingface
from tests.nets import randomize

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def bottlenecks(**options):
    """A ResNet of torchvision's bottlenecks, one a stage."""
    return tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=7, **options)


def sequential(*blocks):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), *blocks)


# name -> (model, branches that a step records or None for any, size of the image). Where images end as a single pixel,
# norms of three values cancel until gradients are rounding: deep networks need larger ones to be compared.
NETS = {
    "resnet18": (lambda: tv.resnet18(num_classes=7), 9, 48),
    "bottlenecks": (bottlenecks, 5, 48),
    "resnext": (lambda: bottlenecks(groups=32, width_per_group=4), 5, 48),
    "dilated": (lambda: bottlenecks(replace_stride_with_dilation=[False, True, True]), 5, 32),
    "zero_init": (lambda: tv.resnet18(num_classes=7, zero_init_residual=True), 9, 48),
    "resnet50": (lambda: tv.resnet50(num_classes=7), 17, 64),
    "wide_resnet50": (lambda: tv.wide_resnet50_2(num_classes=7), 17, 48),
    "hf_basic": (lambda: huggingface(2, "basic"), 4, 33),
    "hf_bottleneck": (lambda: huggingface(2, "bottleneck"), 4, 33),
    "timm_resnet18": (lambda: timm.create_model("resnet18", num_classes=7), 9, 33),
    "timm_resnet26t": (lambda: timm.create_model("resnet26t", num_classes=7), None, 33),
    "timm_resnet50": (lambda: timm.create_model("resnet50", num_classes=7), 17, 64),
    "timm_seresnet50": (lambda: timm.create_model("seresnet50", num_classes=7), None, 33),
    "tutorial_resnet34": (seeds.ResNet34, 17, 33),
    "ours_resnet18": (lambda: models.resnet18(num_classes=7), 9, 33),
    "ours_cifar20": (lambda: models.cifar_resnet(20), 10, 16),
    "preact": (lambda: sequential(PreAct(8), PreAct(8)), None, 13),
    "detectron": (lambda: sequential(DetectronBlock(8), DetectronBlock(8)), 3, 13),
    "mobilenet_v2": (lambda: tv.mobilenet_v2(num_classes=7, width_mult=0.35), None, 64),
    "densenet": (lambda: tv.DenseNet(8, (2, 2), 8, num_classes=7), None, 33),
    "timm_resnetv2": (lambda: timm.create_model("resnetv2_18", num_classes=7), 8, 64),  # norms of timm's own class
    "regnet": (lambda: tv.regnet_y_400mf(num_classes=7), 33, 64),
    "googlenet": (lambda: tv.googlenet(num_classes=7, aux_logits=True, init_weights=False), None, 64),
    "detectron_conv": (lambda: nn.Sequential(DetectronConv(3, 8, 3, norm=nn.BatchNorm2d(8), activation=nn.ReLU()),
                                             DetectronBlock(8)), None, 13),
}
# The smaller ones cover what these do.
LARGE = {"resnext", "dilated", "zero_init", "resnet50", "wide_resnet50", "timm_resnet18", "timm_resnet26t",
         "timm_resnet50", "timm_seresnet50", "tutorial_resnet34", "ours_resnet18", "googlenet", "timm_resnetv2",
         "regnet"}
CASES = [pytest.param(name, recompute, marks=pytest.mark.gate if name in LARGE or recompute and name == "resnet18"
                      else []) for name in NETS for recompute in (False, True)]


def made(name):
    torch.manual_seed(3)
    return randomize(NETS[name][0]()).double()


@pytest.mark.parametrize(("name", "recompute"), CASES)
def test_eight_steps_in_fp64_are_those_of_stock(name, recompute):
    _, branches, size = NETS[name]
    stock, fused = pair(made(name), recompute=recompute)
    x = torch.randn(3, 3, size, size, dtype=torch.float64)
    train(stock, fused, x, 8, 1e-10)
    trains(fused, x, branches)
    assert not any(plan.broken for plan in plans(fused).values()) and not fr.report(fused).notes


@pytest.mark.parametrize("name", seeds.BLOCKS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_tutorial_blocks_train(name, memory_format):
    stock, fused = pair(randomize(seeds.BLOCKS[name]()[0]).double())
    x = torch.randn(3, 16, 9, 9, dtype=torch.float64, requires_grad=True)
    x = x.detach().contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
    optimizers = sgd(stock), sgd(fused)
    for _ in range(3):
        same_step(stock, fused, x)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    trains(fused, x, 0 if name == "plain" else None)  # which has no norm


def test_a_step_records_fewer_nodes_and_the_profiler_sees_the_branches():
    stock, fused = pair(made("bottlenecks"))
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    fused(x)
    mine, theirs = nodes(fused(x)), nodes(stock(x))
    assert mine[BRANCH] == 5 and sum(mine.values()) <= 0.6 * sum(theirs.values())
    assert not any("BatchNorm" in name or "Relu" in name or "Convolution" in name for name in mine)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(x)
    names = [event.name.removeprefix("fused_resnet::") for event in profile.events()
             if event.name.startswith("fused_resnet::")]
    assert names == ["conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"]


def saved_bytes(model, x):
    """Bytes that the graph of a call keeps beside parameters and the input; a storage counts once."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    seen = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            seen[t.untyped_storage().data_ptr()] = t  # kept, so that no other tensor comes to lie there
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for t in seen.values())


@pytest.mark.parametrize("memory_format", FORMATS)
def test_what_a_resnet50_keeps_for_backward(memory_format):
    stock = tv.resnet50().train().to(memory_format=FORMATS[memory_format])
    x = torch.randn(2, 3, 96, 96).contiguous(memory_format=FORMATS[memory_format])
    theirs = saved_bytes(stock, x)
    for recompute, share in ((False, 1.0), (True, 0.6)):
        fused = fr.fuse(stock, recompute=recompute)
        fused(x)
        mine = saved_bytes(fused, x)
        assert mine <= share * theirs, f"recompute={recompute}: {mine / theirs:.3f} of stock's bytes"
