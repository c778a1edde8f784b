"""What the chooser does with a kernel that has several ways to compute, when one of them is caught lying."""

import warnings

import pytest
import torch

from fused_resnet import backends
from fused_resnet.kernels.cpu import conv_bn_act as kernel
from fused_resnet.testing import inputs
from tests.test_backends import FAMILY, PROBLEM, fresh, launch, rows  # noqa: F401  `fresh` is a fixture

WAYS = ("first", "second", "third")


@pytest.fixture
def lies(monkeypatch):
    """oneDNN under three names, the rule picks the second: a set of those that add 1, and the list of what ran."""
    lying, ran, forward = set(), [], kernel.with_tile({"kernel": "onednn"})

    def run(problem, operands, tile):
        ran.append(tile.kernel)
        return forward(problem, operands) + (tile.kernel in lying)

    monkeypatch.setattr(kernel, "candidates", lambda problem: [kernel.Tile(name) for name in WAYS])
    monkeypatch.setattr(kernel, "default", lambda problem: {"kernel": "second"})
    monkeypatch.setattr(kernel, "forward", run)
    return lying, ran


def chosen(problem=PROBLEM):
    choice = backends.choose(FAMILY, problem)
    return choice.name, choice.label, (choice.tile or {}).get("kernel")


def caught(names):
    """Launches once; how many warnings name which of the ways as disabled."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = launch()
    assert torch.allclose(result, inputs.stock(PROBLEM, inputs.make(PROBLEM)), atol=1e-5)
    said = [str(w.message) for w in found]
    assert len(said) == len(names) and all(f'disables cpu {{"kernel": "{name}"}}' in line
                                           for name, line in zip(names, said)), said


def test_the_rule_decides_and_the_others_wait(fresh, lies):  # noqa: F811
    caught([])
    caught([])
    assert lies[1] == ["second", "second"] and chosen() == ("cpu", "heuristic", "second")


def test_the_others_are_tried_before_the_reference(fresh, lies, tmp_path):  # noqa: F811
    lying, ran = lies
    lying |= {"first", "second"}
    caught(["second"])
    assert chosen() == ("cpu", "heuristic", "first")
    caught(["first"])
    caught([])
    assert ran == ["second", "first", "third"] and chosen() == ("cpu", "heuristic", "third")
    assert dict(backends.explain(PROBLEM))["cpu"] is None
    fresh()  # a later process knows
    caught([])
    assert ran[3:] == ["third"] and sorted(v == "ok" for v in rows(tmp_path).values()) == [False, False, True]


def test_the_reference_remains_when_all_lie(fresh, lies):  # noqa: F811
    lying, ran = lies
    lying |= set(WAYS)
    for name in ("second", "first", "third"):
        caught([name])
    caught([])
    assert len(ran) == 3 and chosen() == ("reference", "heuristic", None)
    assert "self-check" in dict(backends.explain(PROBLEM))["cpu"]
    with backends.use("cpu"), pytest.raises(ValueError, match=r"'cpu' cannot run .*self-check"):
        launch()


def test_a_tuned_way_that_lies_leaves_the_rule_and_its_others(fresh, lies):  # noqa: F811
    lying, ran = lies
    lying |= {"third", "second"}
    backends.adopt(FAMILY, PROBLEM, {"backend": "cpu", "tile": {"kernel": "third"}})
    assert chosen() == ("cpu", "tuned", "third")
    caught(["third"])
    caught(["second"])
    caught([])
    assert ran == ["third", "second", "first"]


def test_forcing_the_backend_takes_what_is_left_of_it(fresh, lies):  # noqa: F811
    lying, ran = lies
    lying |= {"second"}
    with backends.use("cpu"):
        caught(["second"])
        caught([])
        assert chosen() == ("cpu", "forced", "first")
    assert ran == ["second", "first"]
