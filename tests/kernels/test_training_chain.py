"""Whole residual branches on Triton kernels alone, forward and backward, beside stock operators."""

import pytest
import torch

from fused_resnet import backends
from tests.ops.test_residual_branch import blocks, close, pairs

pytestmark = [pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
              pytest.mark.skipif(torch.cuda.is_available(), reason="a test of the interpreter")]


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    """Every launch is judged by its own tests; the chooser's check of single images would only repeat them."""
    monkeypatch.setenv("FUSED_RESNET_SELF_CHECK", "off")
    backends.reset()
    yield
    monkeypatch.undo()
    backends.reset()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", blocks())
def test_values_and_gradients_are_those_of_stock(name, recompute):
    seen = set()
    with backends.use("triton"), backends.visited(lambda family, *_: seen.add(family)):
        (y, mine, parts), (expected, theirs, others) = pairs(name, recompute, True, torch.float32,
                                                             torch.channels_last)
        g = torch.randn_like(expected)
        found = torch.autograd.grad(y, mine, g)
    assert {"conv_dgrad", "conv_wgrad", "bn_act_grad"} <= seen
    for a, b in [(y, expected), *zip(found, torch.autograd.grad(expected, theirs, g), strict=True),
                 *((a.running_var, b.running_var) for a, b in zip(parts, others, strict=True))]:
        close(a, b, torch.float32)
