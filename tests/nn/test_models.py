"""ResNets beside torchvision's, and the CIFAR family beside the paper."""

import pytest
import torch
import torchvision
from torch import nn

from fused_resnet import models
from fused_resnet.testing.cases import LAYERS
from tests.nets import judge, randomize

NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
            "wide_resnet50_2", "wide_resnet101_2")


def both(name, **options):
    with torch.device("meta"):  # initialisation is not what these tests are about
        pair = getattr(models, name)(**options), getattr(torchvision.models, name)(**options)
    mine, stock = (m.to_empty(device="cpu").eval() for m in pair)
    generator = torch.Generator().manual_seed(0)
    for p in stock.parameters():
        p.data.normal_(generator=generator).mul_((2 / p[0].numel()) ** 0.5 if p.dim() > 1 else 1)
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
    mine.load_state_dict(randomize(stock).state_dict(), strict=True)
    return mine, stock


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_load_torchvisions_checkpoints_and_agree(name, launches):
    mine, stock = both(name)
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        y = mine(x)
    assert len(launches) == sum(count for _, count in LAYERS[name])
    bound = judge(y, stock, x)
    assert bound.ok, bound


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_layouts(dtype, memory_format):
    mine, stock = (m.to(dtype, memory_format=memory_format) for m in both("resnet18"))
    x = torch.randn(2, 3, 33, 47, dtype=dtype)
    with torch.no_grad():
        y = mine(x)
    bound = judge(y, stock, x)
    assert bound.ok, bound


@pytest.mark.parametrize("options", [
    {"replace_stride_with_dilation": [False, True, True]}, {"num_classes": 7, "width_per_group": 32},
    {"norm_layer": torchvision.ops.FrozenBatchNorm2d}, {"norm_layer": lambda c: nn.BatchNorm2d(c, eps=1e-3)},
], ids=["dilated", "narrow", "frozen", "eps"])
def test_constructor_arguments_mean_what_torchvisions_mean(options, launches):
    mine, stock = both("resnet50", **options)
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        y = mine(x)
    assert len(launches) == 53
    bound = judge(y, stock, x)
    assert bound.ok, bound


@pytest.mark.parametrize("options", [{}, {"zero_init_residual": True}], ids=str)
def test_initialisation_is_torchvisions(options):
    torch.manual_seed(5)
    mine = models.resnet18(**options).state_dict()
    torch.manual_seed(5)
    stock = torchvision.models.resnet18(**options).state_dict()
    assert list(mine) == list(stock)
    assert all(torch.equal(mine[k], stock[k]) for k in stock)


def test_attributes_are_torchvisions():
    with torch.device("meta"):
        mine, stock = models.resnet50(), torchvision.models.resnet50()
    assert [n for n, _ in mine.named_modules()] == [n for n, _ in stock.named_modules()]
    assert [type(m).__name__ for m in mine.modules()] == [type(m).__name__ for m in stock.modules()]
    public = {k for k in vars(stock) if not k.startswith("_")}
    assert public <= set(vars(mine))


def test_wrong_arguments_raise_what_torchvisions_raise():
    for options in ({"replace_stride_with_dilation": [True]}, {"groups": 2}):
        texts = []
        for builder in (models.resnet18, torchvision.models.resnet18):
            with pytest.raises(ValueError) as caught:
                builder(**options)
            texts.append(str(caught.value))
        assert texts[0] == texts[1]


def test_training_step_is_torchvisions_to_the_bit():
    results = []
    for model in both("resnet18", num_classes=10):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(2)
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([1, 2, 3, 4]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([loss, *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_evaluation_follows_training():
    mine, stock = both("resnet18", num_classes=10)
    x = torch.randn(4, 3, 32, 32)
    for _ in range(2):
        for model in (mine, stock):
            model.train()
            model(x).square().mean().backward()
            torch.optim.SGD(model.parameters(), lr=1e-3).step()
            model.eval()
        with torch.no_grad():
            y = mine(x)
        bound = judge(y, stock, x)
        assert bound.ok, bound


class NeedsStocksStrides(nn.Module):
    """Foreign code in the middle of a network, which works on contiguous memory only."""

    def forward(self, x):
        assert x.is_contiguous()
        return x.view(x.size(0), -1).view(x.shape) * 1.0


@pytest.mark.parametrize("place", ["maxpool", "layer3", "avgpool"])
def test_foreign_code_inside_sees_stocks_strides(place, launches):
    mine, stock = both("resnet18")
    for model in (mine, stock):
        with torch.no_grad():
            model(torch.randn(1, 3, 32, 32))
        setattr(model, place, nn.Sequential(getattr(model, place), NeedsStocksStrides()))
    del launches[:]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y = mine(x)
    assert launches
    bound = judge(y, stock, x)
    assert bound.ok, bound


def test_hooks_inside_see_what_stocks_hooks_see():
    seen = []
    x = torch.randn(2, 3, 64, 64)
    for model in both("resnet18"):
        strides = []
        for name in ("conv1", "layer1.0", "layer2.0.relu", "layer2.0.bn2", "layer3.1.conv2", "layer4", "avgpool"):
            model.get_submodule(name).register_forward_hook(
                lambda m, i, o, name=name, strides=strides: strides.append((name, i[0].stride(), o.stride())))
        with torch.no_grad():
            model(x)
        seen.append(strides)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 8  # the shared ReLU is called twice


def test_replaced_and_appended_modules_are_called():
    mine, stock = both("resnet18")
    x = torch.randn(1, 3, 32, 32)
    for change in (lambda m: setattr(m, "fc", nn.Identity()), lambda m: m.layer2.append(nn.Sigmoid()),
                   lambda m: setattr(m.layer1[0], "bn1", nn.Identity()), lambda m: m.layer4.pop(1)):
        with torch.no_grad():
            mine(x)
        change(mine)
        change(stock)
        with torch.no_grad():
            torch.testing.assert_close(mine(x), stock(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_cifar_networks_have_the_papers_depth_and_size(depth):
    with torch.device("meta"):
        model = models.cifar_resnet(depth)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth + 2  # the two projections are not counted
    n = (depth - 2) // 6
    convolutions = 432 + 9 * (2 * n * 256 + (512 + (2 * n - 1) * 1024) + (2048 + (2 * n - 1) * 4096)) + 512 + 2048
    assert sum(m.weight.numel() for m in layers[:-1]) == convolutions


def test_the_deepest_cifar_network_builds():
    with torch.device("meta"):
        model = models.cifar_resnet(1202)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 1201 + 2


@pytest.mark.parametrize("block", [models.BasicBlock, models.Bottleneck])
def test_cifar_inference_agrees_with_its_stock_forward(block, launches):
    model = randomize(models.cifar_resnet(20, 10, 1, block)).eval()
    x = torch.randn(3, 1, 28, 28)
    expected = model(x)  # gradients are on: stock
    assert not launches
    with torch.no_grad():
        y = model(x)
    assert len(launches) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert y.shape == (3, 10)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth,block", [(21, models.BasicBlock), (2, models.BasicBlock), (0, models.BasicBlock), (
    -4, models.BasicBlock), (32, models.Bottleneck)])
def test_impossible_depths_are_named(depth, block):
    with pytest.raises(ValueError, match=rf" {depth} is not"):
        models.cifar_resnet(depth, block=block)
