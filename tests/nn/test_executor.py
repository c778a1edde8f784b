"""The guards of the executor: what must run stock does, and what runs fused sees live weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fused_resnet import backends
from fused_resnet.nn import executor
from tests.nets import judge
from tests.nn.pairs import pair

MODULES = ("conv1", "bn1", "relu", "conv2", "bn2", "downsample", "downsample.0", "downsample.1")


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_fire_as_in_stock(name, kind):
    calls = []
    x = torch.randn(2, 16, 8, 8)
    for module in pair("basic_projected"):
        seen = []
        register = getattr(module.get_submodule(name), kind)
        register(lambda m, i, *o, seen=seen: seen.append([t.stride() for t in (*i, *o)]))
        with torch.no_grad():
            module(x)
            calls.append(seen)
    assert calls[0] == calls[1]
    assert len(calls[0]) == (2 if name == "relu" else 1)


def test_hooks_that_change_the_result_are_obeyed():
    mine, stock = pair("basic")
    x = torch.randn(2, 16, 8, 8)
    for module in (mine, stock):
        module.bn1.register_forward_hook(lambda m, i, o: o * 2)
    with torch.no_grad():
        assert torch.equal(mine(x), stock(x))


def test_removed_hooks_let_the_block_fuse_again(launches):
    mine, _ = pair("basic")
    x = torch.randn(2, 16, 8, 8)
    handle = mine.conv1.register_forward_hook(lambda m, i, o: None)
    with torch.no_grad():
        mine(x)
        assert not launches
        handle.remove()
        mine(x)
    assert len(launches) == 2


def test_global_hooks_see_every_module():
    names = []
    for module in pair("basic_projected"):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, i, o, seen=seen: seen.append(type(m).__name__))
        with torch.no_grad():
            module(torch.randn(2, 16, 8, 8))
        handle.remove()
        names.append(sorted(seen))
    assert names[0] == names[1]


def test_backward_hooks_fire():
    counts = []
    for module in pair("basic"):
        seen = []
        module.conv1.register_full_backward_hook(lambda m, gi, go, seen=seen: seen.append(len(gi)))
        module(torch.randn(2, 16, 8, 8)).sum().backward()
        counts.append(seen)
    assert counts[0] == counts[1] == [1]


UPDATES = {
    "copy_": lambda m: m.conv1.weight.copy_(m.conv1.weight * 2),
    "optimizer": lambda m: m.bn1.weight.add_(torch.ones_like(m.bn1.weight), alpha=-0.5),
    "statistics": lambda m: m.bn2.running_var.mul_(4),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}, assign=True),
    "data": lambda m: setattr(m.conv2.weight, "data", m.conv2.weight.data * 3),
    "parameter": lambda m: setattr(m.conv2, "weight", nn.Parameter(m.conv2.weight * 3)),
    "module": lambda m: setattr(m, "bn1", nn.BatchNorm2d(16, eps=0.1).eval()),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "dtype": lambda m: m.bfloat16().float(),
}


@pytest.mark.parametrize("update", UPDATES)
def test_weights_are_read_live(update):
    mine, stock = pair("basic")
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        before = mine(x)
        for module in (mine, stock):
            UPDATES[update](module)
        after = mine(x)
    assert not torch.equal(before, after)
    bound = judge(after, stock, x)
    assert bound.ok, bound


def test_models_made_under_inference_mode_work():
    with torch.inference_mode():
        mine, stock = pair("basic")
        x = torch.randn(2, 16, 8, 8)
        first = mine(x)
        mine.conv1.weight.mul_(2)
        stock.conv1.weight.mul_(2)
        torch.testing.assert_close(mine(x), stock(x), rtol=1e-4, atol=1e-4)
        assert not torch.equal(first, mine(x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_both_ways_of_saying_inference_fuse(context, launches):
    mine, stock = pair("basic_projected")
    x = torch.randn(2, 16, 8, 8)
    with context():
        y = mine(x)
        torch.testing.assert_close(y, stock(x), rtol=1e-4, atol=1e-4)
        assert y.is_inference() == (context is torch.inference_mode)
    assert len(launches) == 3


@pytest.mark.parametrize("name", ["basic_projected", "bottleneck", "preact", "preact_projected", "conv",
                                  "conv_bare", "bottleneck_frozen", "conv_silu"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_stocks_dtypes(name, given):
    mine, stock = pair(name)
    x = torch.randn(2, 16, 8, 8).to(given)
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = mine(x), stock(x)
    assert y.dtype is expected.dtype
    assert y.stride() == expected.stride()
    error, own = (float((t.double() - exact).square().mean()) for t in (y, expected))
    assert error <= 1.5 * own + 1e-6


def test_autocast_trains_as_stock():
    results = []
    for module in pair("basic"):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = module.train()(torch.randn(2, 16, 8, 8))
        y.float().sum().backward()
        results.append([y, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_half_precision_data_beside_fp32_norms(launches):
    mine, stock = pair("basic")
    for module in (mine, stock):
        module.conv1.bfloat16()
        module.conv2.bfloat16()
    x = torch.randn(2, 16, 8, 8).bfloat16()
    with torch.no_grad():
        y = mine(x)
    assert len(launches) == 2
    bound = judge(y, stock, x)
    assert bound.ok, bound


def test_norm_left_in_training_mode_keeps_its_side_effects():
    counts = []
    x = torch.randn(2, 16, 8, 8)
    for module in pair("basic"):
        module.bn1.train()
        with torch.no_grad():
            y = module(x)
        counts.append((y, module.bn1.num_batches_tracked, module.bn1.running_mean))
    for a, b in zip(*counts):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counts[0][0].stride() == counts[1][0].stride()


@pytest.mark.parametrize("change", [
    lambda m: nn.utils.parametrizations.weight_norm(m.conv1), lambda m: prune.random_unstructured(
        m.conv1, "weight", 0.5), lambda m: setattr(m.conv1, "padding_mode", "circular"), lambda m: setattr(
            m, "relu", nn.ELU()), lambda m: setattr(m, "bn1", nn.InstanceNorm2d(16)), lambda m: setattr(
                m, "conv1", nn.utils.fuse_conv_bn_eval(m.conv1, m.bn1))],
    ids=["parametrized", "pruned", "circular", "elu", "instance_norm", "folded"])
def test_unusual_modules_run_as_they_are(change):
    results = []
    x = torch.randn(2, 16, 8, 8)
    for module in pair("basic"):
        module.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]
        torch.manual_seed(3)
        change(module)
        with torch.no_grad():
            results.append(module.eval()(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_tensor_subclasses_and_modes_see_every_operator():
    class Tagged(torch.Tensor):
        pass

    mine, stock = pair("basic")
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert type(mine(x.as_subclass(Tagged))) is Tagged
        assert torch.equal(torch.func.vmap(mine)(x[None]), torch.func.vmap(stock)(x[None]))
    from torch.utils.flop_counter import FlopCounterMode
    totals = []
    for module in (mine, stock):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(x)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_functional_call_uses_the_given_parameters():
    mine, stock = pair("basic")
    x = torch.randn(2, 16, 8, 8)
    given = {k: v * 2 for k, v in stock.state_dict().items()}
    with torch.no_grad():
        mine(x)
        a, b = (torch.func.functional_call(m, given, (x,)) for m in (mine, stock))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_prologue_with_an_activation_that_no_kernel_knows():
    norm, conv = nn.BatchNorm2d(16).eval(), nn.Conv2d(16, 16, 3, padding=1)
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        y = executor.run(x, conv, nn.BatchNorm2d(16).eval(), nn.ReLU(), prologue=(norm, nn.ELU()))
        expected = torch.relu(nn.BatchNorm2d(16).eval()(conv(nn.functional.elu(norm(x)))))
    assert torch.equal(y, expected)


def test_run_by_itself_keeps_stocks_strides(launches):
    conv, norm = nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24).eval()
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 16, 8, 8).to(memory_format=memory_format)
            assert executor.run(x, conv, norm).is_contiguous(memory_format=memory_format)
    assert len(launches) == 1


def test_errors_inside_a_region_leave_it_closed():
    mine, _ = pair("basic")
    mine.conv2 = nn.Conv2d(15, 16, 3)
    with torch.no_grad(), pytest.raises(RuntimeError):
        mine(torch.randn(2, 16, 8, 8))
    assert not executor.state.inside


@pytest.mark.parametrize("name", ["basic", "bottleneck_projected", "preact"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_forced_backends_agree(name, backend):
    mine, stock = pair(name)
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad(), backends.use(backend):
        y = mine(x)
    bound = judge(y, stock, x)
    assert bound.ok, bound


def test_threads_do_not_share_a_region():
    from concurrent.futures import ThreadPoolExecutor

    mine, stock = pair("bottleneck_projected")
    x = torch.randn(2, 16, 8, 8)

    def work(_):
        with torch.no_grad():
            return mine(x)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(16)))
    for y in results:
        assert torch.equal(y, results[0])
    with torch.no_grad():
        torch.testing.assert_close(results[0], stock(x), rtol=1e-4, atol=1e-4)
