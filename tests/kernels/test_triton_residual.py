"""A residual branch on Triton's kernels, forward and backward, beside autograd of stock operators; all against fp64."""

import pytest
import torch

from fused_resnet import backends, numerics
from fused_resnet.ops import residual_branch
from fused_resnet.ops.residual_parts import Branch, Parts
from tests.ops.test_residual_branch import blocks, given, leaves, stock

MINE = {"bn_act", "bn_act_sums", "bn_act_grad", "conv_bn_stats"}
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture
def ran(monkeypatch, device):
    """(family, backend) of every launch, where Triton comes first and what it refuses runs on the reference."""
    monkeypatch.setenv("FUSED_RESNET_SELF_CHECK", "off")
    monkeypatch.setitem(backends.HEURISTIC, device, ("triton", "reference"))
    backends.reset()
    seen = set()
    with backends.visited(lambda family, problem, operands: seen.add((family, backends.choose(family, problem).name))):
        yield seen
    monkeypatch.undo()
    backends.reset()


def copies(x, shortcut, parts, dtype, device):
    """Leaves of their own, `shortcut` being x where it was."""
    def copy(t):
        return None if t is None else t.detach().to(device, dtype).requires_grad_(t.requires_grad)

    mine = copy(x)
    return mine, mine if shortcut is x else copy(shortcut), [Parts(*map(copy, part)) for part in parts]


def step(run, x, shortcut, parts, dy):
    """Output, gradients of all leaves and running statistics."""
    y = run(x, shortcut, parts)
    grads = torch.autograd.grad(y, leaves(x, shortcut, parts), dy.to(y))
    return [y.detach(), *grads, *(t for part in parts for t in part[4:])]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", blocks())
def test_values_gradients_and_statistics_are_those_of_stock(name, recompute, ran, device):
    stages, projection, parts, adds = blocks(torch.float32)[name]
    spec = Branch(tuple(stages), projection, recompute, True)
    x, shortcut = given(adds, stages, torch.float32)
    dy = torch.randn(stock(spec, *copies(x, shortcut, parts, torch.float64, device)).shape)
    found = step(lambda *operands: residual_branch.run(spec, *operands),
                 *copies(x, shortcut, parts, torch.float32, device), dy)
    assert {(family, "triton") for family in MINE if any(s.batch for s in stages) or family != "conv_bn_stats"} <= ran
    theirs, exact = (step(lambda *operands: stock(spec, *operands), *copies(x, shortcut, parts, dtype, device), dy)
                     for dtype in (torch.float32, torch.float64))
    for i, one in enumerate(zip(found, theirs, exact, strict=True)):
        bound = numerics.check_network(*one, dtype="fp32")
        assert bound.ok, f"result {i}: {bound}"
