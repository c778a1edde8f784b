"""Kernel tests run on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def runnable():
    """Fails, rather than skips, when Triton was imported before it was told to interpret."""
    from fused_resnet.kernels.triton.epilogue import activate

    if not torch.cuda.is_available() and type(activate).__name__ != "InterpretedFunction":
        pytest.fail("no GPU, and triton was imported before tests/conftest.py set TRITON_INTERPRET=1", pytrace=False)


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
