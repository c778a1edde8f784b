"""Our blocks beside the stock ones: keys, outputs, strides, gradients, errors, side effects."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fused_resnet.nn as ours
from fused_resnet import backends
from tests.nets import judge
from tests.nn.pairs import BLOCKS, PARTLY, pair

LAYOUTS = {"nchw": (torch.contiguous_format, torch.contiguous_format),
           "channels_last": (torch.channels_last, torch.channels_last),
           "weights_channels_last": (torch.channels_last, torch.contiguous_format),
           "input_channels_last": (torch.contiguous_format, torch.channels_last)}
SOME = ("basic_projected", "bottleneck", "residual", "preact", "conv")


def outcome(function, *args):
    """What a call gives: ("returned", its result), or the class and text of its exception."""
    try:
        return "returned", function(*args)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", [*BLOCKS, *PARTLY])
def test_state_dict_loads_both_ways_and_forward_leaves_it(name):
    mine, stock = pair(name)
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    stock.load_state_dict(mine.state_dict(), strict=True)
    with torch.no_grad():
        mine(torch.randn(2, 16, 8, 8))
    assert list(mine.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in mine.state_dict().items())


@pytest.mark.parametrize("name", BLOCKS)
def test_equal_seeds_give_stocks_weights(name):
    weights = []
    for which in (0, 1):
        make = BLOCKS[name][0]
        torch.manual_seed(3)
        weights.append(make(which).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*BLOCKS, *PARTLY])
def test_inference_agrees_with_stock(name, layout, dtype, launches):
    mine, stock = (m.to(dtype, memory_format=LAYOUTS[layout][0]) for m in pair(name))
    x = torch.randn(2, 16, 10, 8).to(dtype, memory_format=LAYOUTS[layout][1])
    given = x.clone()
    with torch.no_grad():
        y = mine(x)
        assert y.stride() == stock(x).stride()
    assert len(launches) == {**BLOCKS, **PARTLY}[name][1]
    bound = judge(y, stock, x)
    assert bound.ok, bound
    assert torch.equal(x, given)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 16, 1, 1), (1, 16, 1, 7), (0, 16, 8, 8), (2, 16, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_odd_shapes_are_stocks(name, shape, layout):
    mine, stock = (m.to(memory_format=LAYOUTS[layout][0]) for m in pair(name))
    x = torch.randn(shape).to(memory_format=LAYOUTS[layout][1])
    with torch.no_grad():
        y, expected = mine(x), stock(x)
    assert y.shape == expected.shape
    if name != "preact" or y[0:1, 0].numel() > 1:  # it ends in a bare convolution: oneDNN picks equivalent strides
        assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("view", [lambda x: x[:, :, ::2, ::2], lambda x: x.transpose(2, 3), lambda x: x[:1].expand(
    3, -1, -1, -1), lambda x: x.flatten()[1:1 + 16 * 64].view(1, 16, 8, 8)], ids=["sliced", "transposed", "expanded",
                                                                                "unaligned"])
def test_views_are_read_as_stock_reads_them(name, view):
    mine, stock = pair(name)
    x = view(torch.randn(2, 16, 9, 9))
    with torch.no_grad():
        y, expected = mine(x), stock(x)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval_with_grad"])
@pytest.mark.parametrize("name", [*BLOCKS, *PARTLY])
def test_training_is_stock_to_the_bit(name, training):
    results = []
    for module in pair(name):
        module.train(training)
        torch.manual_seed(1)
        x = torch.randn(4, 16, 8, 8, requires_grad=True)
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        if "frozen" in name:  # torchvision's multiplies and adds; a branch subtracts, multiplies and adds
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", SOME)
def test_input_that_requires_grad_gets_it(name):
    mine, stock = (m.requires_grad_(False) for m in pair(name))
    grads = []
    for module in (mine, stock):
        x = torch.ones(2, 16, 8, 8, requires_grad=True)
        module(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_fused_with_gradients_on_but_nothing_to_differentiate(launches):
    mine, _ = pair("basic")
    mine.requires_grad_(False)(torch.randn(2, 16, 8, 8))
    assert len(launches) == 2


@pytest.mark.parametrize("name", SOME)
def test_half_frozen_networks_train_as_stock(name):
    results = []
    for module in pair(name):
        module.train()
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.eval()
        torch.manual_seed(1)
        y = module(torch.randn(4, 16, 8, 8))
        y.square().sum().backward()
        results.append([y, *(p.grad for p in module.parameters()), *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


BAD = {
    "channels": torch.randn(2, 15, 8, 8), "unbatched": torch.randn(16, 8, 8), "2d": torch.randn(16, 8),
    "5d": torch.randn(2, 16, 8, 8, 8), "double": torch.randn(2, 16, 8, 8).double(), "half": torch.randn(
        2, 16, 8, 8).bfloat16(), "integer": torch.ones(2, 16, 8, 8, dtype=torch.int32), "bool": torch.ones(
            2, 16, 8, 8, dtype=torch.bool), "complex": torch.randn(2, 16, 8, 8, dtype=torch.complex64),
    "sparse": torch.randn(2, 16, 8, 8).to_sparse(), "meta": torch.randn(2, 16, 8, 8, device="meta"), "none": None,
    "list": [1.0], "no_rows": torch.randn(2, 16, 0, 8), "one_value": torch.randn(1, 16, 1, 1),
}


@pytest.mark.parametrize("mode", ["eval", "train", "no_grad"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", [*SOME, "bottleneck_projected", "conv_stride_kernel"])
def test_bad_input_raises_what_stock_raises(name, bad, mode):
    results = []
    for module in pair(name):
        module.train(mode == "train")
        with torch.set_grad_enabled(mode != "no_grad"):
            kind, value = outcome(module, BAD[bad])
        counts = [b for key, b in module.named_buffers() if key.endswith("num_batches_tracked")]
        results.append((kind, value, counts))
    (kind, value, counts), (expected, wanted, wanted_counts) = results
    assert kind == expected
    assert value == wanted if isinstance(wanted, str) else value.shape == wanted.shape
    assert counts == wanted_counts


def test_kernel_larger_than_input_raises_what_stock_raises():
    texts = []
    for module in (ours.ConvBNAct2d(4, 4, 7, padding=0).eval(), nn.Sequential(nn.Conv2d(4, 4, 7))):
        with torch.no_grad(), pytest.raises(RuntimeError) as caught:
            module(torch.randn(1, 4, 4, 4))
        texts.append(str(caught.value))
    assert texts[0] == texts[1] and "Kernel size can't be greater" in texts[0]


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_shortcut_of_another_shape_raises_what_stock_raises(name):
    results = []
    for module in pair(name):
        module.downsample = nn.Conv2d(16, 16, 1, stride=2)
        with torch.no_grad():
            results.append(outcome(module, torch.randn(2, 16, 8, 8)))
    assert results[0] == results[1]
    assert results[0][0] is RuntimeError


@pytest.mark.parametrize("arguments", [{"groups": 2}, {"base_width": 4}, {"dilation": 2}], ids=str)
def test_basic_block_refuses_what_torchvisions_refuses(arguments):
    from torchvision.models.resnet import BasicBlock
    assert outcome(lambda: ours.BasicBlock(16, 16, **arguments)) == outcome(lambda: BasicBlock(16, 16, **arguments))


@pytest.mark.parametrize("arguments", [{"groups": 3}, {"groups": 0}, {"padding": "foo"}, {
    "padding": "same", "stride": 2}], ids=str)
def test_constructor_raises_what_torchvisions_raises(arguments):
    from torchvision.ops.misc import Conv2dNormActivation
    results = [outcome(lambda c=c: c(16, 16, **arguments)) for c in (ours.ConvBNAct2d, Conv2dNormActivation)]
    assert results[0] == results[1]
    assert results[0][0] is ValueError


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("name", BLOCKS)
def test_nan_and_inf_stand_where_stock_has_them(name, value):
    mine, stock = pair(name)
    x = torch.randn(2, 16, 8, 8)
    x[0, 3, 0, 5] = value
    with torch.no_grad():
        y, expected = mine(x), stock(x)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("name", SOME)
def test_modules_of_ones_own_survive_copies(name):
    mine, _ = pair(name)
    x = torch.randn(2, 16, 8, 8)
    file = io.BytesIO()
    torch.save(mine, file)
    file.seek(0)
    with torch.no_grad():
        y = mine(x)
        for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), torch.load(file, weights_only=False)):
            assert torch.equal(twin(x), y)
    y = mine.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype is torch.bfloat16


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", SOME)
def test_compiles_as_one_graph(name, backend):
    torch._dynamo.reset()
    mine, stock = pair(name)
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        y = torch.compile(mine, fullgraph=True, backend=backend)(x)
    assert y.stride() == stock(x).stride()
    bound = judge(y, stock, x)
    assert bound.ok, bound


def test_compiled_blocks_train(name="basic_projected"):
    torch._dynamo.reset()
    mine, stock = (m.train() for m in pair(name))
    x = torch.randn(4, 16, 8, 8)
    torch.compile(mine, fullgraph=True, backend="aot_eager")(x).sum().backward()
    stock(x).sum().backward()
    for a, b in zip(mine.parameters(), stock.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_exports(name="basic_projected"):
    mine, _ = pair(name)
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        program = torch.export.export(mine, (x,))
        torch.testing.assert_close(program.module()(x), mine(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.jit.trace(mine, (x,))(x), mine(x), rtol=1e-5, atol=1e-5)


def test_disabled_runs_stock(monkeypatch, launches):
    monkeypatch.setenv("FUSED_RESNET_DISABLE", "1")
    backends.reset()
    try:
        mine, stock = pair("basic")
        x = torch.randn(2, 16, 8, 8)
        with torch.no_grad():
            assert torch.equal(mine(x), stock(x))
    finally:
        monkeypatch.undo()
        backends.reset()
    assert not launches


@torch.no_grad()
def test_nan_in_a_shortcut_that_is_only_called():
    block = ours.BasicBlock(8, 16, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2))).eval()
    block.downsample[0].weight[0] = float("nan")
    assert block(torch.randn(1, 8, 6, 6))[:, 0].isnan().all()
