"""What the compile gates share."""

from pathlib import Path

import pytest

from tests.gate.workers import compile_all

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """All that is here is a gate, and stays with its file, of which one worker compiles what all tests need."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker("gate")
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """name -> what the compiler made of it, of all that the test module's COMPILED prints."""
    return compile_all(request.module.COMPILED, tmp_path_factory)
