"""Training on a CUDA GPU beside stock: curves within stock's own spread, in fp32 and bf16, and accuracy."""

import statistics
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("typer")

from fused_resnet import backends
from fused_resnet.bench import curves
from fused_resnet.cli.processes import Processes
from tests import test_curves
from tests.test_curves import CURVE, SEEDS, curve

AMPS = (None, "bf16")
BACKENDS = (None, "triton")  # the chooser's choice, and our kernels wherever they are slower, too


@pytest.fixture(scope="module", autouse=True)
def on_cuda():
    """What `test_curves` trains is trained here, without TF32."""
    before, alone = torch.backends.cudnn.allow_tf32, test_curves.ALONE
    torch.backends.cudnn.allow_tf32, test_curves.ALONE = False, Processes(0, 1, "cuda")
    yield
    torch.backends.cudnn.allow_tf32, test_curves.ALONE = before, alone


@pytest.fixture(scope="module", params=AMPS)
def stock(request, on_cuda):
    """(recipe, losses of four stock runs)."""
    recipe = replace(CURVE, amp=request.param)
    return recipe, [curve(recipe, "stock", shuffle).loss for shuffle in range(1, 5)]


@pytest.mark.parametrize("forced", BACKENDS)
def test_300_steps_lie_within_the_spread_of_stock(stock, forced):
    recipe, runs = stock
    with backends.use(forced):
        found = curve(recipe, "fused")
    assert len(found.loss) >= 300 and curves.inside(found.loss, runs) >= 0.95


@pytest.mark.parametrize("forced", BACKENDS)
def test_five_seeds_are_as_accurate_as_stock(forced):
    recipe = replace(CURVE, size=16, epochs=6, rate=0.1)
    stock = statistics.fmean(curve(replace(recipe, seed=seed), "stock").accuracy[-1] for seed in SEEDS)
    with backends.use(forced):
        fused = statistics.fmean(curve(replace(recipe, seed=seed), "fused").accuracy[-1] for seed in SEEDS)
    assert stock > 0.95 and abs(fused - stock) <= 0.005, (stock, fused)
