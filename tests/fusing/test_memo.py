"""A launch remembers its problem: every change that could make another problem of it is noticed."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet import backends
from fused_resnet.fusing import plans, replay
from fused_resnet.nn import executor
from tests.fusing.helpers import agree, both
from tests.fusing.nets import Block
from tests.nets import randomize
from tests.seeds import LateNormBlock

X = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def found(monkeypatch):
    """What was found out anew, as problems, where the steps of a plan run one by one."""
    monkeypatch.setattr(replay, "kind_of", lambda steps, inputs: None)
    seen, problem = [], executor._problem

    def record(*args):
        seen.append(problem(*args))
        return seen[-1]

    monkeypatch.setattr(executor, "_problem", record)
    return seen


def late():
    """A block with prologues."""
    block = LateNormBlock(8, 8)
    block.conv2 = nn.Conv2d(8, 8, 3, padding=1)
    return block


@pytest.fixture(params=[lambda: Block(project=True), late], ids=["block", "prologue"])
def pair(request):
    """(stock, fused), called twice."""
    stock = randomize(request.param()).eval().requires_grad_(False)
    fused = fr.fuse(stock)
    for _ in range(2):
        fused(X)
    return stock, fused


def launches(fused):
    return len(plans(fused)[""].launches)


def test_the_second_call_finds_nothing_out(pair, found):
    stock, fused = pair
    for x in (X, X + 1, X.clone()):
        agree(stock, fused, x)
    assert not found


def vectors(m):
    """New tensors in the places of the old ones."""
    m.bn1.running_mean = m.bn1.running_mean * 2
    m.bn1.running_var = m.bn1.running_var * 3


def trained(m):
    m.bn1.train()
    m.bn1(X * 3)
    m.bn1.eval()


# Changes of what a problem is made of. After each the model must agree, and what it touches must be found out anew.
CHANGES = {
    "stride": lambda m: (setattr(m.conv1, "stride", (2, 1)), setattr(m.conv2, "padding", (2, 2))),
    "dilation": lambda m: (setattr(m.conv1, "dilation", (2, 2)), setattr(m.conv1, "padding", (2, 2))),
    "eps": lambda m: setattr(m.bn1, "eps", 0.3), "no_bias": lambda m: setattr(m.conv2, "bias", None),
    "new_bias": lambda m: setattr(m.conv1, "bias", nn.Parameter(torch.ones(8), False)),
    "no_affine": lambda m: (setattr(m.bn1, "weight", None), setattr(m.bn1, "bias", None)),
    "kernel": lambda m: (setattr(m.conv1, "weight", nn.Parameter(torch.ones(8, 8, 1, 1) / 9, False)),
                         setattr(m.conv1, "padding", (0, 0))),
    "data": lambda m: (setattr(m.conv1.weight, "data", torch.ones(8, 8, 1, 1) / 9),
                       setattr(m.conv1, "padding", (0, 0))),
    "groups": lambda m: (setattr(m.conv1.weight, "data", m.conv1.weight[:, :2].clone()),
                         setattr(m.conv1, "groups", 4)),
    "double": lambda m: m.double(), "trained": trained,
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
}
# New data of the same kind: kernels read them live, whatever is remembered.
LIVE = {
    "loaded": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True)
    and m.requires_grad_(False),
    "parameter": lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv1.weight * 2, False)), "vectors": vectors,
    "written": lambda m: m.bn1.weight.mul_(-2), "to": lambda m: m.double().float()}


@pytest.mark.parametrize("change", [*CHANGES, *LIVE])
def test_changes_of_the_model_are_noticed(pair, found, change):
    stock, fused = pair
    before = fused(X)
    both(stock, fused, {**CHANGES, **LIVE}[change])
    try:
        expected = stock(X.to(stock.conv1.weight.dtype))
    except RuntimeError:  # a stride that the residual does not follow
        with pytest.raises(RuntimeError):
            fused(X)
        return
    agree(stock, fused, X.to(stock.conv1.weight.dtype))
    assert change not in CHANGES or found
    assert change == "channels_last" or not torch.allclose(before.to(expected.dtype), expected) or change == "to"
    del found[:]
    agree(stock, fused, X.to(stock.conv1.weight.dtype))
    assert None in found or not found, "what fits is remembered again"


@pytest.mark.parametrize("x", [
    X[:1], X[:, :, :7].clone(), X.double(), X[:, :, :1, :1].clone(), torch.cat([X, X])],
    ids=["batch", "size", "dtype", "pixel", "more"])
def test_other_inputs_are_noticed(pair, found, x):
    stock, fused = pair
    with contextlib.suppress(RuntimeError):  # the weights are not fp64
        stock(x)
        agree(stock, fused, x)
        assert len(found) == launches(fused)
        agree(stock, fused, x)
        assert len(found) == launches(fused)
    agree(stock, fused, X)


def test_autocast_is_noticed(pair, found):
    stock, fused = pair
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            agree(stock, fused, X)
        assert len(found) >= launches(fused), "a prologue does not fit, and is asked again each time"
        del found[:]
        agree(stock, fused, X)
        assert found
        del found[:]


def test_inference_mode_and_back(pair):
    stock, fused = pair
    with torch.inference_mode():
        agree(stock, fused, X)
        assert fused(X).is_inference()
    agree(stock, fused, X)
    assert not fused(X).is_inference()


def test_the_backend_is_chosen_at_every_call(pair, found):
    stock, fused = pair
    own = {row.backend for row in fr.report(fused)}
    with backends.use("reference"):
        agree(stock, fused, X)
        assert {row.backend for row in fr.report(fused)} == {"reference"}
    agree(stock, fused, X)
    assert {row.backend for row in fr.report(fused)} == own
    backends.reset()
    agree(stock, fused, X)
    assert not found


def test_train_and_eval(pair):
    stock, fused = pair
    for _ in range(2):
        both(stock, fused, lambda m: m.train()(X))
        stock.eval(), fused.eval()
        torch.testing.assert_close(fused(X), stock(X), rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_begin_anew(pair, found):
    stock, fused = pair
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        agree(stock, twin, X)
        assert len(found) >= launches(fused)
        del found[:]


def test_a_memo_keeps_no_tensor_alive(pair):
    _, fused = pair
    x = X.clone()
    gone = weakref.ref(x)
    fused(x)
    del x
    gc.collect()
    assert gone() is None
