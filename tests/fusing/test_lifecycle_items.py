"""What PyTorch's users do to a module, done to stock and to fused models: both must show the same.

Compared are answers, strides, errors with their text, warnings, hooks, names and modes, and then all of that again
while the model is used, trained for two steps and evaluated (`beside`).
"""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.fusing.beside import EVERY, beside, quietly
from tests.fusing.helpers import pickled, saved
from tests.fusing.nets import X


def toggles(model):
    seen = []
    for mode in (True, False, False, True, True, False):
        model.train(mode)
        torch.manual_seed(0)
        seen.append(model(X).detach())
    return seen


def state(model):
    """Other values under the model's keys."""
    return {key: v * 0.5 + 1 if v.is_floating_point() else v + 3 for key, v in model.state_dict().items()}


def without(model, *keys):
    return {key: v for key, v in state(model).items() if key not in keys}


def reshaped(model):
    return {**state(model), "layer1.conv1.weight": torch.ones(3, 3), "stem.1.running_mean": torch.ones(2)}


def loaded(state, **options):
    def item(model):
        answer = model.load_state_dict(state(model), **options)
        return list(answer.missing_keys), list(answer.unexpected_keys)
    return item


def from_meta(model):
    values = state(model)
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(values)


def assigned_from_meta(model):
    values = state(model)
    model.to("meta")
    model.load_state_dict(values, assign=True)
    model.requires_grad_()


def saved_state(model):
    file = io.BytesIO()
    torch.save(state(model), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True, mmap=False))


STATE = {
    "toggles": toggles, "eval_train": lambda m: m.eval().train().eval(),
    "half": lambda m: m.half(), "bfloat16": lambda m: m.bfloat16(), "float": lambda m: m.half().float(),
    "double": lambda m: m.double(), "to_dtype": lambda m: m.to(torch.bfloat16), "type": lambda m: m.type(torch.float64),
    "cpu": lambda m: m.cpu(), "to_cpu": lambda m: m.to("cpu", non_blocking=True), "cuda": lambda m: m.cuda(),
    "to_integer": lambda m: m.to(torch.int32), "to_complex": quietly(lambda m: m.layer1.to(torch.complex64)),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "and_back": lambda m: m.to(memory_format=torch.channels_last).to(memory_format=torch.contiguous_format),
    "part_channels_last": lambda m: m.layer2.to(memory_format=torch.channels_last) and None,
    "part_bfloat16": lambda m: m.layer2.bfloat16() and None, "norms_float": lambda m: norms_float(m.bfloat16()),
    "meta": lambda m: m.to("meta"), "to_empty": from_meta, "assigned_from_meta": assigned_from_meta,
    "share_memory": lambda m: m.share_memory(), "apply": lambda m: m.apply(lambda part: part.requires_grad_(False)),
    "zero_grad": lambda m: m.zero_grad(), "to_nothing": lambda m: m.to(),
    "load": loaded(state), "load_missing": loaded(lambda m: without(m, "layer1.conv1.weight", "stem.1.running_var")),
    "load_unexpected": loaded(lambda m: {**state(m), "layer1.extra": torch.ones(2)}),
    "load_reshaped": loaded(reshaped), "load_nothing": loaded(lambda m: {}),
    "load_no_dict": lambda m: m.load_state_dict([1]),
    "load_not_strict": loaded(lambda m: {**without(m, "layer1.conv1.weight"), "more": X}, strict=False),
    "load_assign": loaded(state, assign=True),
    "load_bfloat16_assign": loaded(lambda m: {k: v.bfloat16() if v.is_floating_point() else v
                                              for k, v in state(m).items()}, assign=True),
    "load_part": lambda m: m.layer1.load_state_dict(state(m.layer1)) and None,
    "state_dict": lambda m: (dict(m.state_dict()), dict(m.state_dict(prefix="a.", keep_vars=True))),
    "state_dict_of_a_part": lambda m: dict(m.layer2.state_dict()),
    "saved_state": saved_state, "deepcopy": copy.deepcopy, "pickle": pickled, "save": saved,
    "copied_twice": lambda m: copy.deepcopy(pickled(m)), "a_part_copied": lambda m: setattr(
        m, "layer1", copy.deepcopy(m.layer1)),
    "deepcopy_with_memo": lambda m: copy.deepcopy(m, {}),
    "extra_state": lambda m: m.register_state_dict_post_hook(lambda *_: None) and list(m.state_dict()),
}


def norms_float(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.float()


def frozen_norms(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval().requires_grad_(False)


def tied(model):
    model.layer1.conv2 = model.layer1.conv1
    model.layer2[0].conv1.weight = model.layer1.conv1.weight


def kept_statistics(model, track):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats = track


class Tagged(torch.Tensor):
    pass


class Negative(nn.Conv2d):
    def forward(self, x):
        return -super().forward(x)


def each(model, method):
    for m in model.modules():
        if hasattr(m, method):
            getattr(m, method)()


def every_norm(**values):
    def item(model):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                for name, value in values.items():
                    setattr(m, name, value)
    return item


def strides(model):
    model.layer1.conv1.stride = (2, 2)
    model.layer1.conv2.stride = model.layer1.conv2.padding = (1, 1)
    model.layer1.downsample = nn.AvgPool2d(2)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(model):
    parametrize.register_parametrization(model.layer1.conv1, "weight", Doubled())
    parametrize.register_parametrization(model.layer2[0].bn1, "bias", Doubled())


def unparametrized(model):
    parametrized(model)
    model(X)
    parametrize.remove_parametrizations(model.layer1.conv1, "weight")
    parametrize.remove_parametrizations(model.layer2[0].bn1, "bias", leave_parametrized=False)


def pruned(model, forever=False):
    prune.l1_unstructured(model.layer1.conv1, "weight", 0.5)
    prune.ln_structured(model.layer2[0].conv2, "weight", 0.25, n=2, dim=0)
    if forever:
        model(X)
        prune.remove(model.layer1.conv1, "weight")
        prune.remove(model.layer2[0].conv2, "weight")


def sync(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def renamed(model):
    model.layer1.add_module("relu", nn.Tanh())
    model.register_module("extra", nn.Conv2d(1, 1, 1))
    model.layer2.add_module("last", nn.Sigmoid())
    del model.layer2[0]


def folded(model):
    model.eval()
    model.layer1.conv1 = nn.utils.fuse_conv_bn_eval(model.layer1.conv1, model.layer1.bn1)
    model.layer1.bn1 = nn.Identity()
    model.stem[0], model.stem[1] = nn.utils.fuse_conv_bn_eval(model.stem[0], model.stem[1]), nn.Identity()


def lazily(model):
    model.layer1.conv1 = nn.LazyConv2d(8, 3, padding=1, bias=False)
    torch.manual_seed(0)
    return model(X)


def inference_parameters(model):
    with torch.inference_mode():
        for m in model.modules():
            for name, p in m._parameters.items():
                if p is not None:
                    m._parameters[name] = nn.Parameter(p.clone(), requires_grad=False)
            for name, b in m._buffers.items():
                m._buffers[name] = b.clone()
    return [t.is_inference() for t in (*model.parameters(), *model.buffers())]


REWRITTEN = {
    "parametrize": parametrized, "remove_parametrizations": unparametrized, "prune": pruned,
    "prune_remove": lambda m: pruned(m, True),
    "weight_norm": lambda m: parametrizations.weight_norm(m.layer1.conv1) and None,
    "old_weight_norm": quietly(lambda m: nn.utils.weight_norm(m.layer1.conv1)),
    "remove_weight_norm": quietly(lambda m: nn.utils.remove_weight_norm(nn.utils.weight_norm(m.layer1.conv1))),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.layer2[0].conv2) and None,
    "old_spectral_norm": quietly(lambda m: nn.utils.spectral_norm(m.layer2[0].conv2)),
    "orthogonal": lambda m: parametrizations.orthogonal(m.layer1.conv1) and None,
    "tied": tied, "sync_batch_norm": sync, "frozen_norms": frozen_norms, "folded": folded,
    "eps": every_norm(eps=0.3), "momentum": every_norm(momentum=0.7), "no_momentum": every_norm(momentum=None),
    "untracked": every_norm(track_running_stats=False),
    "no_statistics": every_norm(running_mean=None, running_var=None), "no_affine": every_norm(weight=None, bias=None),
    "eps_of_zero": every_norm(eps=0.0), "no_counter": every_norm(num_batches_tracked=None),
    "strides": strides, "padding": lambda m: setattr(m.stem[0], "padding", (1, 2)),
    "impossible_groups": lambda m: setattr(m.layer1.conv1, "groups", 3),
    "circular": lambda m: setattr(m.layer1.conv1, "padding_mode", "circular"),
    "inplace": lambda m: setattr(m.layer1.relu, "inplace", False),
    "activation": lambda m: setattr(m.layer1, "relu", nn.LeakyReLU(0.1)),
    "group_norm": lambda m: setattr(m.layer1, "bn1", nn.GroupNorm(2, 8)),
    "submodules": renamed, "deleted": lambda m: delattr(m.layer1, "bn1"),
    "wrong_channels": lambda m: setattr(m.layer1, "bn1", nn.BatchNorm2d(7)),
    "reset_statistics": lambda m: each(m, "reset_running_stats"),
    "reset_parameters": lambda m: each(m, "reset_parameters"),
    "frozen": lambda m: m.requires_grad_(False), "part_frozen": lambda m: m.layer1.requires_grad_(False) and None,
    "weight_frozen": lambda m: m.layer1.conv1.weight.requires_grad_(False) and None,
    "thawed": lambda m: m.requires_grad_(False).requires_grad_(True), "lazy": lazily,
    "a_part_in_eval": lambda m: m.layer1.eval() and None, "a_part_trains": lambda m: m.layer2[0].bn1.train() and None,
    "inference_parameters": inference_parameters,
    "mirrored": lambda m: setattr(m, "layer1", nn.Sequential(m.layer1, m.layer1)),
    "buffer_is_parameter": lambda m: m.layer1.bn1._buffers.update(
        running_mean=nn.Parameter(m.layer1.bn1.running_mean, requires_grad=False)),
    "double_norm": lambda m: m.layer1.bn1.double() and None,
    "conv_of_a_subclass": lambda m: setattr(m.layer1.conv1, "__class__", Negative),
    "weight_of_a_subclass": lambda m: setattr(m.layer1.conv1, "weight", nn.Parameter(
        m.layer1.conv1.weight.detach().as_subclass(Tagged))),
}


ITEMS = {**STATE, **REWRITTEN}


@pytest.mark.parametrize("name", ITEMS)
def test_item(name):
    beside(ITEMS[name], "called", mode=False)


@pytest.mark.gate
@pytest.mark.parametrize("made, mode", EVERY)
@pytest.mark.parametrize("name", ITEMS)
def test_every_item(name, made, mode):
    beside(ITEMS[name], made, mode)
