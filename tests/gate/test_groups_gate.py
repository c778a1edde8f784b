"""Tests of a gate's file stay with one worker, which makes what all need: pytest and pytest-xdist must agree."""

import pytest


def test_names_end_with_their_group(request):
    if not request.config.getoption("loadgroup", False):
        pytest.skip("needs --dist loadgroup")
    assert request.node.nodeid.endswith("@test_groups_gate")
