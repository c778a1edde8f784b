import pytest

from fused_resnet import fuse
from fused_resnet.fusing import plan
from tests.fusing.nets import Net, X
from tests.nets import randomize


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Warnings that come once a process come once a test here."""
    plan._warned.clear()


@pytest.fixture
def stock():
    return randomize(Net()).eval().requires_grad_(False)


@pytest.fixture
def fused(stock):
    """`stock`, fused and called once."""
    model = fuse(stock)
    model(X)
    return model
