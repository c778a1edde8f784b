"""What the compile gates share."""

import pytest

from tests.gate.workers import compile_all


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """name -> what the compiler made of it, of all that the test module's COMPILED prints."""
    return compile_all(request.module.COMPILED, tmp_path_factory)
