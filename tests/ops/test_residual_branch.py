"""The residual branch beside stock operators: values, gradients, gradients of gradients, statistics, what is saved."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.bench.steps import saved_bytes
from fused_resnet.ops import bits, residual_branch
from fused_resnet.ops.residual_parts import Branch, Parts, Stage

EXACT = {torch.float64: 1e-12, torch.float32: 2e-4}


def stage(kernel=3, stride=1, batch=True, activation="relu", groups=1, momentum=0.1):
    return Stage((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups, 1e-5, batch, momentum, activation)


def part(c, k, kernel=3, *, bias=False, affine=True, dtype=torch.float64, groups=1):
    def leaf(*shape):
        return (torch.randn(*shape, dtype=dtype) * 0.5).requires_grad_()

    return Parts(leaf(k, c // groups, kernel, kernel), leaf(k) if bias else None, leaf(k) if affine else None,
                 leaf(k) if affine else None, torch.randn(k, dtype=dtype), torch.rand(k, dtype=dtype) + 0.5)


def twin(t):
    return None if t is None else t.detach().clone().requires_grad_(t.requires_grad)


def stock(spec, x, shortcut, parts):
    def unit(a, s, p):
        return F.batch_norm(F.conv2d(a, p.weight, p.bias, s.stride, s.padding, s.dilation, s.groups), p.running_mean,
                            p.running_var, p.gamma, p.beta, s.batch, s.momentum, s.eps)

    def act(z, s):
        return {"relu": F.relu, "relu6": F.relu6, "identity": lambda t: t}[s.activation](z)

    z = x
    for i, (s, p) in enumerate(zip(spec.stages, parts, strict=False)):
        z = unit(z if i == 0 else act(z, spec.stages[i - 1]), s, p)
    if spec.projection is not None:
        z = z + unit(shortcut, spec.projection, parts[-1])
    elif shortcut is not None:
        z = z + shortcut
    return act(z, spec.stages[-1])


def blocks(dtype=torch.float64):
    """name -> (stages, projection, parts, what is added)."""
    made = {}
    for activation in ("relu", "relu6", "identity"):
        made[f"alone-{activation}"] = ([stage(activation=activation)], None, [part(6, 5, dtype=dtype)], "nothing")
    made["basic"] = ([stage(), stage()], None, [part(6, 8, dtype=dtype), part(8, 6, dtype=dtype)], "x")
    made["basic-other"] = ([stage(), stage()], None, [part(6, 8, bias=True, dtype=dtype), part(8, 6, dtype=dtype)], "y")
    made["bottleneck"] = ([stage(1), stage(3), stage(1)], None, [
        part(6, 4, 1, dtype=dtype), part(4, 4, 3, dtype=dtype, bias=True), part(4, 6, 1, dtype=dtype)], "x")
    made["projected"] = ([stage(1), stage(3, 2), stage(1)], stage(1, 2, activation="identity"), [
        part(6, 4, 1, dtype=dtype), part(4, 4, 3, dtype=dtype), part(4, 10, 1, dtype=dtype),
        part(6, 10, 1, dtype=dtype)], "x")
    made["projected-other"] = ([stage(3, 2), stage()], stage(1, 2, activation="identity"), [
        part(6, 5, dtype=dtype), part(5, 7, dtype=dtype), part(6, 7, 1, dtype=dtype)], "input")
    made["grouped-relu6"] = ([stage(1, activation="relu6"), stage(3, groups=2, activation="relu6"), stage(1)], None, [
        part(6, 4, 1, dtype=dtype), part(4, 4, 3, dtype=dtype, groups=2), part(4, 6, 1, dtype=dtype)], "x")
    with torch.no_grad():
        for name in ("alone-relu6", "grouped-relu6"):
            for p in made[name][2]:
                p.gamma.mul_(12)  # so that values are held at 6
    fixed = stage(1, batch=False, activation="identity")
    made["frozen-inside"] = ([stage(1), stage(3, batch=False), stage(1)], fixed, [
        part(6, 4, 1, dtype=dtype), part(4, 4, 3, dtype=dtype, bias=True, affine=False), part(4, 6, 1, dtype=dtype),
        part(6, 6, 1, dtype=dtype, bias=True)], "x")
    made["frozen-end"] = ([stage(3), stage(3, batch=False)], None, [
        part(6, 4, affine=False, dtype=dtype), part(4, 6, bias=True, dtype=dtype)], "x")
    return made


def given(adds, stages, dtype=torch.float64, layout=torch.contiguous_format):
    def tensor(c):
        return torch.randn(3, c, 6, 5, dtype=dtype).contiguous(memory_format=layout).requires_grad_()

    x = tensor(6)
    return x, {"nothing": None, "x": x, "y": tensor(6) if adds == "y" else None,
               "input": tensor(6) if adds == "input" else None}[adds]


def leaves(x, shortcut, parts):
    extra = [shortcut] if shortcut is not None and shortcut is not x else []
    return [x, *extra, *(t for p in parts for t in p[:4] if t is not None)]


def pairs(name, recompute=False, launches=False, dtype=torch.float64, layout=torch.contiguous_format):
    """(y, leaves, parts) of the branch and of stock on equal tensors."""
    torch.manual_seed(0)
    stages, projection, parts, adds = blocks(dtype)[name]
    spec = Branch(tuple(stages), projection, recompute, launches)
    x, shortcut = given(adds, stages, dtype, layout)
    x2, parts2 = twin(x), [Parts(*map(twin, p)) for p in parts]
    shortcut2 = x2 if shortcut is x else twin(shortcut)
    return ((residual_branch.run(spec, x, shortcut, parts), leaves(x, shortcut, parts), parts),
            (stock(spec, x2, shortcut2, parts2), leaves(x2, shortcut2, parts2), parts2))


def close(a, b, dtype=torch.float64):
    assert a is not None and a.dtype == b.dtype and a.shape == b.shape
    scale = b.abs().max().item() + 1
    assert (a - b).abs().max().item() <= EXACT[dtype] * scale


WAYS = list(itertools.product((False, True), (False, True)))


@pytest.mark.parametrize(("recompute", "launches"), WAYS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", blocks())
def test_values_gradients_and_statistics_are_those_of_stock(name, layout, recompute, launches):
    (y, mine, parts), (expected, theirs, parts2) = pairs(name, recompute, launches, layout=layout)
    close(y, expected)
    n, k, p, q = expected.shape
    g = torch.randn_like(expected)
    other = torch.channels_last if layout is torch.contiguous_format else torch.contiguous_format
    for given in (g, torch.randn(n, 3 * k, p, q, dtype=g.dtype)[:, k:2 * k], torch.ones((), dtype=g.dtype).expand_as(g),
                  g.contiguous(memory_format=other)):  # gradients come in any layout
        for a, b in zip(torch.autograd.grad(y, mine, given, retain_graph=True),
                        torch.autograd.grad(expected, theirs, given, retain_graph=True), strict=True):
            close(a, b)
    for a, b in zip(parts, parts2, strict=True):
        close(a.running_mean, b.running_mean)
        close(a.running_var, b.running_var)
    torch.autograd.grad(y, mine, g)  # the graph was retained
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, mine, g)


@pytest.mark.parametrize("name", blocks())
def test_on_atens_operators_the_bits_are_those_of_stock(name):
    (y, mine, _), (expected, theirs, _) = pairs(name, dtype=torch.float32)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    g = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, mine, g), torch.autograd.grad(expected, theirs, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("recompute", "launches"), WAYS)
@pytest.mark.parametrize("name", ["basic", "projected", "frozen-inside", "alone-relu6"])
def test_gradients_of_gradients_are_those_of_stock(name, recompute, launches):
    (y, mine, _), (expected, theirs, _) = pairs(name, recompute, launches)
    g, second = torch.randn_like(y), []
    for out, inputs in ((y, mine), (expected, theirs)):
        first = torch.autograd.grad(out, inputs, g, create_graph=True)
        total = sum((t * torch.arange(1, t.numel() + 1, dtype=t.dtype).view(t.shape)).sum() for t in first)
        second.append(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))
    for a, b in zip(*second, strict=True):
        assert (a - b).abs().max() <= 1e-8 * (b.abs().max() + 1)


@pytest.mark.parametrize(("recompute", "launches"), WAYS)
@pytest.mark.parametrize("name", ["basic-other", "bottleneck", "projected", "projected-other", "frozen-inside"])
def test_any_subset_may_be_frozen(name, recompute, launches):
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        torch.manual_seed(0)
        stages, projection, parts, adds = blocks()[name]
        spec = Branch(tuple(stages), projection, recompute, launches)
        x, shortcut = given(adds, stages)
        tensors = leaves(x, shortcut, parts)
        frozen = torch.rand(len(tensors), generator=generator) < 0.6
        for t, off in zip(tensors, frozen, strict=True):
            t.requires_grad_(not off)
        if frozen.all():
            continue
        x2, parts2 = twin(x), [Parts(*map(twin, p)) for p in parts]
        shortcut2 = x2 if shortcut is x else twin(shortcut)
        mine, theirs = tensors, leaves(x2, shortcut2, parts2)
        residual_branch.run(spec, x, shortcut, parts).square().sum().backward()
        stock(spec, x2, shortcut2, parts2).square().sum().backward()
        for a, b in zip(mine, theirs, strict=True):
            if b.grad is None:
                assert a.grad is None
            else:
                close(a.grad, b.grad)


@pytest.mark.parametrize("launches", [False, True])
def test_gradcheck(launches):
    torch.manual_seed(0)
    stages, projection, parts, _ = blocks()["projected"]
    spec = Branch(tuple(s._replace(momentum=0.0) for s in stages), projection._replace(momentum=0.0), True, launches)
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    tensors = [t for p in parts for t in p]

    def run(x, *tensors):
        return residual_branch.run(spec, x, x, [Parts(*tensors[i:i + 6]) for i in range(0, len(tensors), 6)])

    assert torch.autograd.gradcheck(run, (x, *tensors), nondet_tol=0.0)


@pytest.mark.parametrize("name", ["bottleneck", "projected"])
def test_checkpointing_and_accumulation(name):
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    stages, projection, parts, _ = blocks()[name]
    spec = Branch(tuple(stages), projection, True)
    x, _ = given("x", stages)
    stock_parts = [Parts(*map(twin, p)) for p in parts]
    x2 = twin(x)
    for _ in range(2):
        checkpoint(lambda t: residual_branch.run(spec, t, t, parts), x, use_reentrant=False).square().sum().backward()
        checkpoint(lambda t: stock(spec, t, t, stock_parts), x2, use_reentrant=False).square().sum().backward()
    for a, b in zip(leaves(x, x, parts), leaves(x2, x2, stock_parts), strict=True):
        close(a.grad, b.grad)
    for a, b in zip(parts, stock_parts, strict=True):
        close(a.running_var, b.running_var)


@pytest.mark.parametrize("launches", [False, True])
def test_a_recomputing_bottleneck_saves_less_than_six_tenths_of_stock(launches):
    c = 16
    stages = (stage(1), stage(3), stage(1))
    parts = [part(4 * c, c, 1, dtype=torch.float32), part(c, c, dtype=torch.float32), part(c, 4 * c, 1,
                                                                                              dtype=torch.float32)]
    x = torch.randn(8, 4 * c, 28, 28).contiguous(memory_format=torch.channels_last).requires_grad_()
    mine = saved_bytes(lambda: residual_branch.run(Branch(stages, None, True, launches), x, x, parts))
    theirs = saved_bytes(lambda: stock(Branch(stages), x, x, parts))
    assert mine <= 0.45 * theirs


def test_nan_and_inf_pass_as_in_stock():
    for value in (float("nan"), float("inf")):
        for recompute in (False, True):
            torch.manual_seed(0)
            stages, _, parts, _ = blocks()["frozen-end"]
            spec = Branch(tuple(s._replace(batch=False) for s in stages), None, recompute)
            x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
            x[0, 0, 1, 1] = value
            x.requires_grad_()
            x2 = twin(x)
            y, expected = residual_branch.run(spec, x, x, parts), stock(spec, x2, x2, parts)
            torch.testing.assert_close(y, expected, equal_nan=True)
            g = torch.ones_like(y)
            torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expected, x2, g)[0],
                                       equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (2, 8, 3, 3), (1, 16, 1, 1), (3, 5, 1, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bits_come_back(shape, layout):
    t = torch.randn(shape).contiguous(memory_format=layout)
    packed = bits.pack(t > 0)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-t.numel() // 8)
    assert torch.equal(bits.unpack(packed, t), t > 0)
    first = bits.dense(t)[0] > 0
    assert bool(packed[0] & 1) == bool(first)
