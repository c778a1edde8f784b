import pytest
import torch

from fused_resnet import backends


def here(name):
    """Skips a test of a backend that is not there: a native library that was not built is no fault of its kernels."""
    reason = backends.available()[name] if name else None
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
