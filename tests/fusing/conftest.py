import pytest

from fused_resnet.fusing import plan


@pytest.fixture(autouse=True)
def fresh_warnings():
    """Warnings that come once a process come once a test here."""
    plan._warned.clear()
