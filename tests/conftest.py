"""Shared by all tests: one thread, fixed seeds, a cache of their own, Triton's interpreter without a GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported; what compiles for a GPU does so in processes without it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fused_resnet.testing.memory import poisoned
from fused_resnet.testing.shim import torchvision_shim

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torchvision_shim()


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """No test reads or writes the user's own cache; what tests learn is forgotten with the session."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("FUSED_RESNET_CACHE_DIR")
    os.environ["FUSED_RESNET_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["FUSED_RESNET_CACHE_DIR"]
    else:
        os.environ["FUSED_RESNET_CACHE_DIR"] = before


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """Uninitialised tensors are full of NaN while the test runs."""
    with poisoned():
        yield
