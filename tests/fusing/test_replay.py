"""Replayed calls: the values of the same steps one by one, and no change of anything goes unnoticed."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet import numerics
from fused_resnet.fusing import plans, replay, slices
from tests.fusing.helpers import agree, both, pickled
from tests.fusing.replays import (
    image,
    needs_library,
    played,
    step_by_step,
    stock_net,
    stretches,
    warm,
    warmed,
)

pytestmark = needs_library
__all__ = ["played"]  # a fixture that runs by itself


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["basic", "bottleneck", "pool"])
def test_a_replay_gives_what_the_steps_give(played, name, dtype, batch):
    """One tape holds all launches behind the image's, pools too."""
    stock = stock_net(name, dtype)
    fused = fr.fuse(stock)
    x, other = (image(batch, 24, dtype=dtype, seed=seed) for seed in (1, 2))
    warm(fused, x)
    del played[:]
    for given in (x, other, x.contiguous(memory_format=torch.channels_last)):
        result = fused(given)
        with step_by_step():
            assert torch.equal(fused(given), result)
        agree(stock, fused, given)
    assert len(played) >= 4 and len(set(played)) == 1 and played[0] >= len(plans(fused)[""].launches) - 1


@pytest.mark.parametrize("name", ["basic", "bottleneck", "pool", "opaque"])
def test_a_replay_leaves_the_values_that_the_steps_leave(monkeypatch, played, name):
    """What later steps read is there, and nothing else is kept."""
    _, fused = warmed(name)
    plan, play, seen = plans(fused)[""], replay.Stretch.play, []

    def compare(self, values, sight):
        twin = [v.clone(memory_format=torch.preserve_format) if isinstance(v, torch.Tensor) else v for v in values]
        assert play(self, values, sight)
        plan._walk(self.steps, twin, False, True)
        seen.append([v is None for v in values])
        assert seen[-1] == [v is None for v in twin]
        assert all(torch.equal(v, w) for v, w in zip(values, twin, strict=True) if isinstance(v, torch.Tensor))
        return True

    monkeypatch.setattr(replay.Stretch, "play", compare)
    fused(image(channels=16 if name == "opaque" else 3))
    assert played and seen


KEPT = []  # tensors that somebody still has


def scale_weight(m):
    with torch.no_grad():
        m.layer1.conv1.weight.mul_(1.5)


def hidden_write(m):
    m.layer1.conv1.weight.data.copy_(m.layer1.conv1.weight.data * 1.5)
    if "forward" in m.__dict__:
        fr.refresh(m)


def other_data(m):
    m.layer2.conv2.weight.data = m.layer2.conv2.weight.data * 1.5


def other_data_beside_the_old(m):
    """Only the address tells."""
    KEPT.append(m.layer2.conv2.weight.data)
    other_data(m)


def new_parameter(m):
    m.layer2.conv2.weight = nn.Parameter(m.layer2.conv2.weight * 1.5, requires_grad=False)


def transposed(m):
    """Memory, version and shape are the same."""
    m.layer1.conv1.weight.data = m.layer1.conv1.weight.data.transpose(2, 3)


def parameter_in_the_same_place(m):
    """What dies first gives its address, and perhaps its id, to what comes."""
    values = m.layer2.conv2.weight.detach().numpy() * 1.5
    del m.layer2.conv2.weight
    m.layer2.conv2.weight = nn.Parameter(torch.tensor(values), requires_grad=False)


def load(m, assign=False):
    state = {k: v * 1.5 if v.is_floating_point() else v for k, v in m.state_dict().items()}
    m.load_state_dict(state, assign=assign)


def to_and_back(m):
    """Conversions often give back the address of the start, and raise no version."""
    m.to(torch.bfloat16).to(torch.float32)


def trained(m):
    """The statistics are written without a new version."""
    m.layer1.bn1.train()
    for _ in range(3):
        m.layer1.bn1(3 * torch.randn(4, m.layer1.bn1.num_features, 5, 5) + 1)
    m.layer1.bn1.eval()


def set_attribute(path, name, value):
    def change(m):
        owner = m.get_submodule(path)
        setattr(owner, name, value(owner) if callable(value) else value)
    return change


def in_place(path, name):
    def change(m):
        with torch.no_grad():
            getattr(m.get_submodule(path), name).add_(0.7)
    return change


CHANGES = {
    "weight in place": scale_weight,
    "weight through .data, refreshed": hidden_write,
    "weight.data": other_data,
    "weight.data beside the old": other_data_beside_the_old,
    "weight.data transposed": transposed,
    "new Parameter": new_parameter,
    "Parameter in the same place": parameter_in_the_same_place,
    "load_state_dict": load,
    "load_state_dict, assigned": lambda m: load(m, True),
    "bf16 and back": to_and_back,
    "channels_last": lambda m: (m.to(memory_format=torch.channels_last), scale_weight(m)),
    "running_mean in place": in_place("layer1.bn2", "running_mean"),
    "running_var in place": in_place("layer1.bn2", "running_var"),
    "running_mean replaced": set_attribute("layer2.bn1", "running_mean", lambda bn: bn.running_mean + 0.7),
    "running_var replaced": set_attribute("layer2.bn1", "running_var", lambda bn: bn.running_var * 2),
    "gamma in place": in_place("layer2.bn1", "weight"),
    "beta in place": in_place("layer2.bn1", "bias"),
    "gamma replaced": set_attribute("layer2.bn1", "weight",
                                    lambda bn: nn.Parameter(bn.weight * 2, requires_grad=False)),
    "gamma and beta gone": lambda m: [setattr(m.layer2.bn1, name, None) for name in ("weight", "bias")],
    "eps": set_attribute("layer1.bn1", "eps", 0.5),
    "eps of the last norm": set_attribute("layer2.shortcut.1", "eps", 0.5),
    "norm trained": trained,
    "bias of a convolution": set_attribute("layer1.conv1", "bias",
                                           lambda c: nn.Parameter(torch.ones(c.out_channels), requires_grad=False)),
    "stride": lambda m: [setattr(c, "stride", (4, 4)) for c in (m.layer2.conv1, m.layer2.shortcut[0])],
    "padding and dilation": lambda m: [setattr(m.layer1.conv2, name, (2, 2)) for name in ("padding", "dilation")],
    "hook": lambda m: m.layer1.bn1.register_forward_hook(lambda *_: _[-1] * 2),
    "hook on the model": lambda m: m.register_forward_hook(lambda *_: _[-1] * 2),
    "other module": set_attribute("layer1", "conv1", lambda block: copy.deepcopy(block.conv2)),
    "pool": set_attribute("pool", "stride", 1),
    "other activation": set_attribute("", "relu", lambda m: nn.Hardswish()),
}


@pytest.mark.parametrize("name", ["basic", "pool"])
@pytest.mark.parametrize("what", [what for what in CHANGES if what != "pool"])
def test_a_change_is_seen_at_the_next_call(played, what, name):
    """And at the one after it; then it is replayed again, unless the plan has stepped aside."""
    stock, fused = warmed(name)
    x = image()
    del played[:]
    before = fused(x)
    assert played, "nothing was replayed: the test would prove nothing"
    both(stock, fused, CHANGES[what])
    expected = stock(x)
    assert numerics.measure(before, expected).rel > 1e-3
    for _ in range(3):
        agree(stock, fused, x)
    if not plans(fused)[""].fallbacks:
        del played[:]
        agree(stock, fused, image(seed=3))
        assert played


def test_another_tensor_over_the_same_memory(played):
    """Of the same version, too, while somebody keeps the old one: only its identity tells."""
    stock, fused = warmed()
    both(stock, fused, scale_weight)
    warm(fused, image())
    kept = []
    for m in (stock, fused):
        conv = m.layer1.conv1
        old = conv.weight
        kept.append(old)
        conv.weight, wanted = nn.Parameter(old.data, requires_grad=False), old * 1.5
        for _ in range(old._version):
            conv.weight.copy_(wanted)
        assert (conv.weight._version, conv.weight.data_ptr()) == (old._version, old.data_ptr())
    del played[:]
    for _ in range(3):
        agree(stock, fused, image())
    assert played


@pytest.mark.parametrize("what", ["weight in place", "weight through .data, refreshed", "bf16 and back",
                                  "running_mean in place", "norm trained", "eps", "new Parameter", "stride"])
def test_every_kind_of_call_sees_a_change(played, what):
    stock, fused = warmed()
    kinds = [image(), image(size=17), image(3)]
    for x in kinds:
        warm(fused, x)
    both(stock, fused, CHANGES[what])
    for x in kinds * 2:
        agree(stock, fused, x)


QUANTISED = ("weight in place", "weight through .data, refreshed", "weight.data", "new Parameter",
             "Parameter in the same place", "load_state_dict", "bf16 and back", "running_mean in place", "eps",
             "gamma replaced", "norm trained", "bias of a convolution", "stride", "padding and dilation", "pool")


@pytest.mark.parametrize("what", QUANTISED)
def test_a_quantised_model_sees_changes(played, what):
    stock = stock_net("other pool")
    x = image(2)
    model = fr.quantize(stock, x)
    warm(model, x)
    del played[:]
    before = model(x)
    assert played == [8]  # the image made uint8, six convolutions, the pool
    with step_by_step():
        assert torch.equal(model(x), before)
    for m in (stock, model):
        torch.manual_seed(5)
        CHANGES[what](m)
    with step_by_step():
        anew = fr.unfuse(copy.deepcopy(model))(x)
    del played[:]
    for _ in range(4):
        result = model(x)
        assert not torch.equal(result, before) and numerics.measure(result, anew).rel < 0.5
        with step_by_step():
            assert torch.equal(model(x), result)
    assert played


def test_training_the_whole_model_between_calls(played):
    stock, fused = warmed()
    for _ in range(2):
        for m in (stock, fused):
            torch.manual_seed(5)
            m.train().requires_grad_(True)
            optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
            m(image(4)).square().mean().backward()
            optimizer.step()
            m.eval().requires_grad_(False)
        del played[:]
        expected = stock(image())
        for _ in range(3):
            assert numerics.measure(fused(image()), expected).rel < 1e-3
        assert played


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("changed", ["original", "copy"])
def test_copies_of_a_warm_model_know_nothing_of_it(played, clone, changed):
    stock, fused = warmed()
    twin, other = clone(fused), copy.deepcopy(stock)
    assert not plans(twin)[""].replays._known and stretches(fused)
    for x in (image(), image(seed=2)):
        warm(twin, x)
    model, same = (fused, twin) if changed == "original" else (twin, fused)
    scale_weight(model), scale_weight(other)
    for _ in range(3):
        agree(other, model, image())
        agree(stock, same, image())
    assert pickle.dumps(plans(fused)[""].replays) == pickle.dumps(replay.Replays())


def test_tuned_models_replay(played):
    """Tuning looks at a problem when it first runs; what is recorded is what it chose."""
    stock = stock_net("bottleneck")
    fused = fr.fuse(stock, tune=0.02)
    for _ in range(6):
        agree(stock, fused, image(1))
    assert len(played) >= 2


def test_what_one_call_plays_whole_is_not_cut_into_slices(monkeypatch, played):
    monkeypatch.setattr(slices.timing, "cache_bytes", lambda: 300_000)
    stock, x = stock_net().layer1, image(4, 24, channels=16)
    fused = fr.fuse(stock)
    warm(fused, x)
    assert played and set(plans(fused)[""].cuts.values()) == {None}
    monkeypatch.setattr(replay, "covers", lambda *_: False)
    fused = fr.fuse(stock)
    warm(fused, x)
    assert None not in plans(fused)[""].cuts.values()
