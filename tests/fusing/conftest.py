import pytest

from fused_resnet import fuse
from tests.fusing.nets import Net, X
from tests.fusing.pairs import net, pair
from tests.nets import randomize


@pytest.fixture
def stock():
    return randomize(Net()).eval().requires_grad_(False)


@pytest.fixture
def fused(stock):
    """`stock`, fused and called once."""
    model = fuse(stock)
    model(X)
    return model


@pytest.fixture(params=[False, True], ids=["keep", "recompute"])
def models(request):
    """(stock, fused) in training mode and fp64."""
    return pair(net(), recompute=request.param)
