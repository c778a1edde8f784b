"""When a plan must step aside: training, gradients, hooks, and modules that are no longer what they were."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fused_resnet as fr
from fused_resnet import backends
from fused_resnet.fusing import plans
from fused_resnet.nn import training
from tests.fusing.helpers import agree, aside, both, same_strides, twice
from tests.fusing.nets import Block, Net, X
from tests.nets import randomize


def test_training_is_stock_bit_for_bit():
    stock = randomize(Net()).train()
    fused = fr.fuse(stock, recompute=False)
    for step in range(3):
        losses = []
        for model in (stock, fused):
            x = X.clone().requires_grad_()
            torch.manual_seed(step)
            loss = model(x).square().sum()
            loss.backward()
            losses.append((loss, x.grad))
        assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])
        for (name, a), b in zip(stock.named_parameters(), fused.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b[1].grad, rtol=1e-5, atol=1e-6, msg=name)
        for (name, a), b in zip(stock.named_buffers(), fused.buffers(), strict=True):
            assert torch.equal(a, b), name
    assert not aside(fused) and not fr.report(fused).notes


def test_by_default_a_cpu_trains_on_the_stock_modules_and_says_so(monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: False)  # which makes kernels of ours possible here
    stock = randomize(Net()).train()
    fused = fr.fuse(stock)
    for model in (stock, fused):
        torch.manual_seed(0)
        model(X).square().sum().backward()
    for (name, a), b in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert fr.report(fused).notes[0] == f"the model ran stock 1 times: {training.STOCK_WINS}"


def test_train_mode_without_gradients(stock, fused):
    both(stock, fused, lambda m: m.train()(X))
    assert not aside(fused)
    for a, b in zip(stock.buffers(), fused.buffers(), strict=True):
        assert torch.equal(a, b)
    twice(stock.eval(), fused.eval(), X)


@pytest.mark.parametrize("tracked", [True, False])
def test_statistics_that_training_wrote_are_used(stock, fused, tracked):
    """batch_norm writes the running statistics without a new version of the tensors."""
    for steps in range(3):
        for model in (stock, fused):
            for bn in (model.stem[1], model.layer1.bn1):
                bn.train()
                bn(X * (steps + 2)) if tracked else model.layer1(X * (steps + 2))
            model.eval()
        twice(stock, fused, X)


def test_a_fused_call_between_forward_and_backward():
    stock = randomize(Net()).eval()
    fused = fr.fuse(stock)
    for _ in range(2):
        loss = fused(X).sum()
        with torch.no_grad():
            fused(X)
        loss.backward()
        fused.train()(X)
        fused.eval()


@pytest.mark.parametrize("part", ["layer1.bn1", "layer1.drop", "layer1", "stem.1", "head"])
def test_a_part_in_training_mode_trains(stock, fused, part):
    both(stock, fused, lambda m: m.get_submodule(part).train())
    outputs = []
    for model in (stock, fused):
        torch.manual_seed(0)
        outputs.append(model(X))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for a, b in zip(stock.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not aside(fused)


@pytest.mark.parametrize("who", ["x", "weight", "bias", "gamma", "head"])
def test_gradients_are_those_of_stock(stock, fused, who):
    names = {"weight": "layer1.conv1.weight", "bias": "layer1.conv2.bias", "gamma": "stem.1.weight",
             "head": "head.bias"}
    grads = []
    for model in (stock, fused):
        x = X.clone()
        leaf = x if who == "x" else model.get_parameter(names[who])
        leaf.requires_grad_()
        model(x).sum().backward()
        grads.append(leaf.grad)
        leaf.requires_grad_(False)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        agree(stock, fused, X.clone().requires_grad_())
    assert not aside(fused)


def test_frozen_parameters_fuse_with_gradients_enabled(stock, fused):
    assert torch.is_grad_enabled() and not aside(fused)
    agree(stock, fused, X)
    assert not aside(fused)


PLACES = ["", "stem", "stem.0", "layer1", "layer1.relu", "layer1.bn2", "layer1.tail", "layer1.drop", "layer2",
          "layer2.0.downsample", "layer2.0.downsample.1", "head"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_forward_hooks_see_what_stock_shows_them(stock, fused, place, memory_format):
    x = X.contiguous(memory_format=memory_format)
    seen = []
    for model in (stock, fused):
        log = []
        module = model.get_submodule(place)
        handles = [module.register_forward_pre_hook(lambda m, a, log=log: log.append(a[0].clone())),
                   module.register_forward_hook(lambda m, a, out, log=log: log.append(out.clone()))]
        model(x)
        seen.append(log)
        for handle in handles:
            handle.remove()
    assert len(seen[0]) == len(seen[1]) > 0
    for a, b in zip(*seen):
        same_strides(b, a)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    before = sum(plans(fused)[""].fallbacks.values())
    fused(x)
    assert sum(plans(fused)[""].fallbacks.values()) == before, "without hooks the plan answers again"


def test_hooks_may_change_the_result_and_the_input(stock, fused):
    def change(model):
        model.layer1.bn1.register_forward_hook(lambda m, a, out: out * 2)
        model.layer2[1].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
        model.stem.register_forward_hook(lambda m, a, kw, out: out + 1, with_kwargs=True)

    both(stock, fused, change)
    agree(stock, fused, X)


def test_global_hooks_see_every_module(stock, fused):
    logs = [], []
    for model, log in zip((stock, fused), logs):
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, out, log=log: log.append(type(m).__name__))
        model(X)
        handle.remove()
    assert logs[0] == logs[1] and "BatchNorm2d" in logs[0]


def test_backward_hooks_fire(stock, fused):
    logs = [], []
    for model, log in zip((stock, fused), logs):
        model.layer1.bn2.register_full_backward_hook(lambda m, i, o, log=log: log.append(o[0].shape))
        model(X.clone().requires_grad_()).sum().backward()
    assert logs[0] == logs[1] != []


def replaced(name, make):
    def change(model):
        *path, last = name.split(".")
        setattr(model.get_submodule(".".join(path)), last, randomize(make()).eval().requires_grad_(False))
    return change


def weight_norm(model):
    torch.nn.utils.parametrizations.weight_norm(model.layer1.conv1)
    model.requires_grad_(False)


def old_weight_norm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model.layer1.conv1)
    model.requires_grad_(False)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def new_forward(model):
    relu = model.layer1.bn1
    relu.forward = lambda x, relu=relu: type(relu).forward(relu, x) + 1


CHANGES = {
    "conv": replaced("layer1.conv1", lambda: nn.Conv2d(8, 8, 5, padding=2)),
    "activation": replaced("layer1.relu", nn.GELU), "identity": replaced("layer1.tail", nn.Tanh),
    "dropout": replaced("layer1.drop", nn.Sigmoid), "norm": replaced("stem.1", lambda: nn.GroupNorm(2, 8)),
    "block": replaced("layer2.1", lambda: Block(project=True)),
    "none_to_module": replaced("layer1.downsample", lambda: nn.Conv2d(8, 8, 1)),
    "module_to_none": lambda m: setattr(m.layer2[0], "downsample", None),
    "appended": lambda m: m.layer2.append(nn.Sigmoid()), "scalar": lambda m: setattr(m.layer1, "scale", 3.0),
    "flag": lambda m: setattr(m.layer1, "use_drop", False), "forward": new_forward,
    "class": lambda m: setattr(m.layer1.relu, "__class__", nn.Sigmoid),
    "sync_batch_norm": lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m).eval(),
    "parametrize": lambda m: parametrize.register_parametrization(m.layer1.conv1, "weight", Halved()),
    "parametrize_norm": lambda m: parametrize.register_parametrization(m.layer1.bn1, "weight", Halved()),
    "weight_norm": weight_norm, "old_weight_norm": old_weight_norm,
    "prune": lambda m: prune.random_unstructured(m.layer1.conv1, "weight", 0.5) and m.requires_grad_(False),
    "no_statistics": lambda m: (setattr(m.stem[1], "running_mean", None), setattr(m.stem[1], "running_var", None)),
    "stride_as_int": lambda m: setattr(m.stem[0], "stride", 2), "eps": lambda m: setattr(m.layer1.bn1, "eps", 0.1),
    "no_bias": lambda m: setattr(m.stem[0], "bias", None), "no_affine": lambda m: setattr(m.layer1.bn1, "weight", None),
    "padding_mode": lambda m: setattr(m.layer2, "0", fr.unfuse(m.layer2[0])),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before_first_call", "after", "then_copied"])
def test_modules_changed_after_fuse_are_obeyed(stock, change, when):
    fused = fr.fuse(stock)
    if when != "before_first_call":
        fused(X)
    both(stock, fused, CHANGES[change])
    stock.requires_grad_(False), fused.requires_grad_(False)
    if when == "then_copied" and change not in ("forward", "old_weight_norm", "prune"):
        fused = copy.deepcopy(fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            agree(stock, fused, X)


UPDATES = {
    "copy_": lambda m: m.stem[0].weight.copy_(torch.ones(8, 8, 1, 1)), "add_": lambda m: m.layer1.bn1.bias.add_(1),
    "running_mean": lambda m: m.layer1.bn2.running_mean.sub_(1), "running_var": lambda m: m.stem[1].running_var.mul_(3),
    "data": lambda m: setattr(m.layer1.conv1.weight, "data", torch.ones(8, 8, 3, 3)),
    "assigned": lambda m: setattr(m.layer1.conv1, "weight", nn.Parameter(torch.ones(8, 8, 3, 3), False)),
    "loaded": lambda m: m.load_state_dict(randomize(Net(), 3).state_dict()),
    "assign": lambda m: m.load_state_dict(randomize(Net(), 3).state_dict(), assign=True) and m.requires_grad_(False),
    "double": lambda m: m.double(), "bfloat16": lambda m: m.bfloat16(), "half": lambda m: m.half(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "one_channels_last": lambda m: m.layer2.to(memory_format=torch.channels_last),
    "nan_weight": lambda m: m.stem[0].weight[3].fill_(float("nan")),
    "inf_weight": lambda m: m.layer1.conv2.weight[0, 0].fill_(float("inf")),
    "nan_statistic": lambda m: m.layer1.bn1.running_mean[2].fill_(float("nan")),
    "negative_variance": lambda m: m.layer1.bn2.running_var[1].fill_(-1),
    "nan_residual": lambda m: m.layer2[0].downsample[1].weight[1].fill_(float("nan")),
}


@pytest.mark.parametrize("update", UPDATES)
@torch.no_grad()
def test_weights_are_read_live(stock, fused, update):
    both(stock, fused, UPDATES[update])
    x = X.to(stock.stem[0].weight.dtype)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        twice(stock, fused, given)
    a, b = stock.layer2(stock.layer1(stock.stem(x))), fused.layer2(fused.layer1(fused.stem(x)))
    same_strides(b, a)


def test_writes_that_nobody_sees_show_after_refresh(stock, fused):
    for model in (stock, fused):
        model.layer1.conv1.weight.detach().numpy()[:] *= 2
        model.stem[1].weight.data.copy_(torch.ones(8))
    assert fr.refresh(fused) > 0
    twice(stock, fused, X)
