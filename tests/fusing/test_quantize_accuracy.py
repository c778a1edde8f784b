"""A trained network keeps its answers in 8 bits: handwritten digits that it has not seen."""

import functools

import pytest
import torch
import torch.nn.functional as F

import fused_resnet as fr
from fused_resnet import numerics
from fused_resnet.cli import datasets

WANTED = 0.995
pytestmark = pytest.mark.xdist_group("trained")  # once for all methods


@functools.cache
def trained(depth, epochs, size=None, rate=0.2, batch=64):
    """The digits, and a network in eval mode after one cycle of SGD on them."""
    data = datasets.load("mnist", size)
    generator = torch.Generator().manual_seed(0)
    model = fr.models.cifar_resnet(depth, in_channels=data.channels).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(data.train_y) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(data.train_y), generator=generator)
        for at in order[:len(order) // batch * batch].split(batch):
            optimiser.zero_grad()
            F.cross_entropy(model(data.train_x[at].contiguous(memory_format=torch.channels_last)),
                            data.train_y[at]).backward()
            optimiser.step()
            schedule.step()
    return data, model.eval()


def hold(data, model, method="minmax"):
    quantised = fr.quantize(model, data.train_x[:256].split(64), method=method)
    with torch.no_grad():
        stock, result = model(data.test_x), quantised(data.test_x)
        assert all(row.dtype == "int8" for row in fr.report(quantised))
        verdict = fr.verify(model, quantised, data.test_x[:200])
    right = (stock.argmax(1) == data.test_y).float().mean().item()
    loss = right - (result.argmax(1) == data.test_y).float().mean().item()
    same = numerics.agreement(result, stock)
    assert verdict and right > 0.9, (right, str(verdict))
    assert same >= WANTED and loss <= 0.003, f"{method}: {same:.2%} agree, {loss:.2%} of the pictures lost"


def test_digits_keep_their_class():
    hold(*trained(8, 2, 16))


@pytest.mark.gate
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("depth", [20])
def test_deeper_networks_keep_their_classes(method, depth):
    hold(*trained(depth, 3), method)
