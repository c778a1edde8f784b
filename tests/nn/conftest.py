import pytest

from fused_resnet.nn import executor


@pytest.fixture
def launches(monkeypatch):
    """Every fused launch of the test, as the arguments of the family's `run`."""
    seen, run = [], executor.family.run

    def record(*args):
        seen.append(args)
        return run(*args)

    monkeypatch.setattr(executor.family, "run", record)
    return seen
