"""What the benchmark's tests share: no pauses, and a network that takes milliseconds."""

import pytest
import torch

from fused_resnet import models, timing


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0.0)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return models.cifar_resnet(8).eval()
