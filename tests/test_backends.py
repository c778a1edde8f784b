"""The chooser: what it picks, what it says about the rest, and what it does with a kernel that lies."""

import importlib
import json
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from fused_resnet import backends, judge
from fused_resnet.kernels.cpu import conv_bn_act as onednn
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import conv
from fused_resnet.tuning import Table

FAMILY = family.FAMILY
PROBLEM = conv(16, 16, 6, residual=True)
BARE = conv(16, 16, 6, prologue="relu", norm=False, activation="identity")  # nothing follows the convolution


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that knows nothing: `fresh(SELF_CHECK="always")` sets variables and forgets again."""

    def start(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"FUSED_RESNET_{name}", value)
        backends.reset()

    start(CACHE_DIR=str(tmp_path), SELF_CHECK="first")
    yield start
    monkeypatch.undo()
    backends.reset()


def launch(problem=PROBLEM, seed=0):
    return family.OP(*inputs.arguments(problem, inputs.make(problem, seed)))


def rows(folder):
    return json.loads((folder / "cache.json").read_text())["rows"]


@pytest.fixture
def wrong_kernel(monkeypatch):
    """oneDNN, the only kernel of its backend, forgets the residual; counts its launches."""
    calls, forward = [], onednn.forward

    def lie(problem, operands, tile):
        calls.append(problem)
        return forward(problem._replace(residual=False), operands._replace(residual=None), tile)

    monkeypatch.setattr(onednn, "candidates", lambda problem: [onednn.Tile("onednn")])
    monkeypatch.setattr(onednn, "forward", lie)
    return calls


def test_available_gives_a_reason_for_each_absent_backend():
    found = backends.available()
    assert tuple(found) == backends.NAMES
    assert found["reference"] is None
    if not torch.cuda.is_available():
        assert "CUDA" in found["cudnn"]


def test_choice_on_the_cpu(fresh):
    assert backends.choose(FAMILY, PROBLEM).name == "cpu"
    assert backends.choose(FAMILY, PROBLEM._replace(dtype="fp64")).name == "reference"
    assert backends.choose(FAMILY, PROBLEM._replace(activation="silu")).name == "cpu"
    assert backends.choose(FAMILY, BARE).name == "reference"
    assert backends.choose(FAMILY, PROBLEM._replace(device="meta")).name == "reference"


def test_explain_names_every_backend_in_order(fresh):
    rows = backends.explain(PROBLEM)
    assert [name for name, _ in rows] == list(backends.NAMES)
    assert dict(rows)["cpu"] is None and dict(rows)["reference"] is None
    assert "fp64" in dict(backends.explain(PROBLEM._replace(dtype="fp64")))["cpu"]
    assert "prologue" in dict(backends.explain(BARE))["cpu"]
    assert "nothing" in dict(backends.explain(PROBLEM._replace(N=0)))["cpu"]


CUDNN = [({"device": "cpu"}, "cpu"), ({"dtype": "fp64"}, "fp64"), ({"prologue": "relu"}, "prologue"),
         ({"activation": "silu"}, "silu"), ({"groups": 4}, "grouped")]


@pytest.mark.parametrize("change,word", CUDNN, ids=str)
def test_cudnn_says_what_it_refuses(monkeypatch, change, word):
    cudnn = importlib.import_module("fused_resnet.kernels.cudnn.conv_bn_act")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    problem = PROBLEM._replace(device="cuda")
    assert cudnn.refuse(problem) is None
    assert word in cudnn.refuse(problem._replace(**change))


@pytest.mark.parametrize("change,word", [
    ({"device": "cuda"}, "cuda"), ({"dtype": "fp64"}, "fp64"),
    ({"prologue": "relu", "norm": False, "residual": False, "activation": "identity"}, "prologue")], ids=str)
def test_onednn_says_what_it_refuses(change, word):
    assert onednn.refuse(PROBLEM) is None
    assert word in onednn.refuse(PROBLEM._replace(**change))


def test_use_forces_and_lifts(fresh):
    with backends.use("reference"):
        assert backends.choose(FAMILY, PROBLEM).name == "reference"
        with backends.use(None):
            assert backends.choose(FAMILY, PROBLEM).name == "cpu"
        launch()
        assert backends.last() == "reference"
    launch()
    assert backends.last() == "cpu"


def test_use_refuses_unknown_names_and_impossible_problems(fresh):
    with pytest.raises(ValueError, match=r"unknown backend 'tpu'.*cudnn"), backends.use("tpu"):
        pass
    with backends.use("cpu"), pytest.raises(ValueError, match=r"'cpu' cannot run .*fp64.*: oneDNN has no fp64"):
        launch(PROBLEM._replace(dtype="fp64"))
    assert backends.choose(FAMILY, PROBLEM).name == "cpu"


def test_environment_forces(fresh):
    fresh(BACKEND="reference")
    assert backends.choose(FAMILY, PROBLEM).name == "reference"
    fresh(BACKEND="tpu")
    with pytest.raises(ValueError, match="FUSED_RESNET_BACKEND='tpu'"):
        launch()


def test_tuned_rows_come_first(fresh):
    key = f"tuned {FAMILY} {PROBLEM.id} {backends.device_name('cpu')}"
    backends.cache().set(key, {"backend": "reference"})
    assert backends.choose(FAMILY, PROBLEM).name == "reference"
    for useless in ({"backend": "cudnn"}, None):  # it may run elsewhere
        backends.cache().set(key, useless)
        fresh()
        assert backends.choose(FAMILY, PROBLEM).name == "cpu"


@dataclass(frozen=True)
class Tile:
    size: int
    label: str = "heuristic"


@pytest.fixture
def tiles(monkeypatch):
    """oneDNN gets tiles: of a size of at most 64, at most as large as C. Collects those that ran.

    Its own rule names none of them, as in the kernels for a GPU.
    """
    ran, forward = [], onednn.with_tile({"kernel": "onednn"})

    def with_tile(tile):
        return lambda problem, operands: ran.append(tile["size"]) or forward(problem, operands)

    monkeypatch.delattr(onednn, "default")
    monkeypatch.setattr(onednn, "forward", forward)
    monkeypatch.setattr(onednn, "with_tile", with_tile)
    monkeypatch.setattr(onednn, "candidates", lambda problem: [Tile(s) for s in (16, 32, 64) if s <= problem.C])
    return ran


@pytest.fixture
def shipped(monkeypatch):
    """`shipped((problem, backend, size))`: a table of these rows is the one of this machine."""
    def ship(*rows):
        table = Table([{"family": FAMILY, "problem": problem.id, "backend": name, "ms": 1.0, "label": "measured",
                        "tile": None if size is None else {"size": size, "label": "tuned"}}
                       for problem, name, size in rows])
        monkeypatch.setattr(backends, "_table", lambda device: table)
        backends.reset()

    return ship


def chosen(problem):
    choice = backends.choose(FAMILY, problem)
    return choice.name, choice.label, (choice.tile or {}).get("size")


WIDE = conv(64, 64, 8, residual=True, n=4)


def test_a_choice_says_by_which_rule(fresh, tiles, shipped):
    shipped((WIDE, "cpu", 32), (WIDE._replace(N=9), "cpu", 64), (WIDE._replace(residual=False), "reference", None))
    assert chosen(WIDE) == ("cpu", "shipped", 32)
    assert chosen(WIDE._replace(N=3)) == ("cpu", "nearest", 32) and chosen(WIDE._replace(N=8)) == ("cpu", "nearest", 64)
    assert chosen(WIDE._replace(residual=False, N=5)) == ("reference", "nearest", None)
    assert chosen(WIDE._replace(N=64)) == ("cpu", "heuristic", None)
    backends.adopt(FAMILY, WIDE, {"backend": "cpu", "tile": {"size": 16}})
    assert chosen(WIDE) == ("cpu", "tuned", 16)
    with backends.use("cpu"):
        assert chosen(WIDE) == ("cpu", "forced", 16)
    with backends.use("reference"):
        assert chosen(WIDE) == ("reference", "forced", None)
    launch(WIDE)
    launch(WIDE._replace(N=8))
    assert tiles == [16, 64]


def test_a_neighbours_tile_must_be_legal_here(fresh, tiles, shipped):
    narrow = WIDE._replace(C=32)
    shipped((WIDE, "cpu", 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(narrow) == ("cpu", "heuristic", None)
        shipped((WIDE, "cpu", 64), (WIDE._replace(N=9), "cpu", 32))
        assert chosen(narrow) == ("cpu", "nearest", 32)  # the second nearest
        launch(narrow)
    assert tiles == [32]


ROWS = [{"backend": "tpu"}, {"tile": None}, "nonsense", ["cpu"], 3, {"backend": "cpu", "tile": {"size": 128}},
        {"backend": "cpu", "tile": {"width": 16}}, {"backend": "cpu", "tile": [16]},
        {"backend": "reference", "tile": {"size": 16}}]


@pytest.mark.parametrize("useless", ROWS, ids=str)
def test_rows_that_cannot_be_are_ignored_with_one_warning(fresh, tiles, useless):
    backends.cache().set(backends.tuned_key(FAMILY, WIDE), useless)
    with pytest.warns(UserWarning, match=rf"ignores the tuned row of {WIDE.id.replace('+', '.')}: ") as caught:
        launch(WIDE)
        launch(WIDE)
    assert len(caught) == 1 and chosen(WIDE) == ("cpu", "heuristic", None)


def test_a_tile_for_a_kernel_without_tiles_is_ignored(fresh):
    backends.cache().set(backends.tuned_key(FAMILY, WIDE), {"backend": "cpu", "tile": {"BLOCK_M": 64}})
    with pytest.warns(UserWarning, match="cpu has no such tile for it: {'BLOCK_M': 64}"):
        assert chosen(WIDE) == ("cpu", "heuristic", None)


def test_shipped_rows_of_an_impossible_tile_are_ignored(fresh, tiles, shipped):
    shipped((WIDE, "cpu", 128), (WIDE._replace(N=3), "tpu", None))
    with pytest.warns(UserWarning, match="ignores the shipped row") as caught:
        assert chosen(WIDE) == ("cpu", "heuristic", None)
    assert len(caught) == 1


def test_a_tile_that_lies_leaves_the_kernels_own(fresh, tiles, monkeypatch):
    forward = onednn.forward
    monkeypatch.setattr(onednn, "with_tile", lambda tile: lambda problem, o: forward(problem, o) + 1)
    backends.adopt(FAMILY, WIDE, {"backend": "cpu", "tile": {"size": 16}})
    with pytest.warns(UserWarning, match="disables cpu"):
        launch(WIDE)
    assert chosen(WIDE) == ("cpu", "heuristic", None)
    assert dict(backends.explain(WIDE))["cpu"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch(WIDE)


def test_a_problem_is_seen_before_it_runs(fresh):
    seen = []
    with backends.visited(lambda *what: seen.append(what)):
        launch()
        with backends.visited(lambda *what: seen.append("inner")):
            launch()
        launch()
    launch()
    assert [what if what == "inner" else what[:2] for what in seen] == [(FAMILY, PROBLEM), "inner", (FAMILY, PROBLEM)]


def test_first_use_is_checked_once_and_remembered(fresh, tmp_path, monkeypatch):
    checks, check = [], judge.numerics.check
    monkeypatch.setattr(judge.numerics, "check", lambda *a, **k: checks.append(1) or check(*a, **k))
    launch()
    launch(seed=1)
    launch(PROBLEM._replace(N=5))
    assert len(checks) == 1  # the verdict is that of the layer, for any batch
    assert [v for k, v in rows(tmp_path).items() if k.startswith("verdict")] == ["ok"]
    fresh()
    launch()
    assert len(checks) == 1


def test_a_wrong_kernel_is_disabled_with_one_warning(fresh, tmp_path, wrong_kernel):
    operands = inputs.make(PROBLEM)
    expected = inputs.stock(PROBLEM, operands)
    with pytest.warns(UserWarning, match=rf"disables cpu .* for {PROBLEM.id.replace('+', '.')}.*self-check") as caught:
        first = launch()
    assert len([w for w in caught if w.category is UserWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = launch()
        more = launch(PROBLEM._replace(N=4))
    assert torch.equal(first, expected) and torch.equal(again, expected)
    assert torch.equal(more, inputs.stock(PROBLEM._replace(N=4), inputs.make(PROBLEM._replace(N=4))))
    assert len(wrong_kernel) == 1
    assert "self-check" in dict(backends.explain(PROBLEM))["cpu"]
    assert ["self-check" in v for v in rows(tmp_path).values()] == [True]
    fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(launch(), expected)
    assert len(wrong_kernel) == 1
    assert backends.choose(FAMILY, PROBLEM._replace(K=32, residual=False)).name == "cpu"  # others keep it


def test_always_checks_every_launch(fresh, monkeypatch):
    fresh(SELF_CHECK="always")
    launch()
    forward = onednn.forward
    monkeypatch.setattr(backends.choose(FAMILY, PROBLEM), "forward", lambda p, o: forward(p, o) + 1)
    with pytest.warns(UserWarning, match="disables cpu"):
        launch()


def test_off_believes_everything(fresh, tmp_path, wrong_kernel):
    fresh(SELF_CHECK="off")
    problem = PROBLEM
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = launch()
    assert not torch.equal(result, inputs.stock(problem, inputs.make(problem)))
    assert wrong_kernel and not (tmp_path / "cache.json").exists()


def test_operands_that_are_not_finite_prove_nothing(fresh, tmp_path):
    problem = conv(16, 16, 6, activation="silu")
    operands = inputs.make(problem)
    operands.x[0, 0, 0, 0] = float("nan")
    family.OP(*inputs.arguments(problem, operands))
    assert not (tmp_path / "cache.json").exists()
    assert dict(backends.explain(problem))["cpu"] is None


def test_memory_running_short_leaves_the_check_for_later(fresh, tmp_path, monkeypatch):
    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(judge.numerics, "check", short)
        launch()
    assert not (tmp_path / "cache.json").exists()
    launch()
    assert rows(tmp_path)


def test_broken_cache_file_is_reported_once_and_left_alone(fresh, tmp_path):
    (tmp_path / "cache.json").write_text("{ half a fi")
    fresh()
    with pytest.warns(UserWarning, match=r"cache in memory.*cache\.json"):
        launch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch(PROBLEM._replace(C=32))
    assert (tmp_path / "cache.json").read_text() == "{ half a fi"


class Pair(NamedTuple):
    """Operands of a family of training, for which the batch is one: a mask among them."""

    x: torch.Tensor
    mask: torch.Tensor
    reuse: bool = False


@pytest.mark.parametrize(("error", "ok"), [(0.0, True), (1e-3, False)])
def test_families_with_several_results_are_checked_over_the_whole_batch(fresh, monkeypatch, tmp_path, error, ok):
    def moments(problem, operands):
        assert operands.mask.dtype is torch.uint8
        return operands.x.mean(0), operands.x.square().mean(0), None, operands.mask

    kernel = SimpleNamespace(FOLDED=False, needs_finite=lambda problem: False, refuse=lambda problem: None)
    kernel.forward = lambda problem, operands: (operands.x.mean(0), operands.x.square().mean(0) + error, None,
                                                1 - operands.mask)
    monkeypatch.setitem(backends._references, "moments", moments)
    monkeypatch.setattr(backends, "_offers", lambda name, family: name == "cpu")
    monkeypatch.setattr(backends, "_kernel", lambda family, name: kernel)
    operands = Pair(torch.randn(2, 16, 6, 6), torch.ones(2, 16, 6, 6, dtype=torch.uint8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            result = backends.run("moments", PROBLEM, operands)
    assert torch.equal(result[1], operands.x.square().mean(0)) and backends.last() == ("cpu" if ok else "reference")
    assert len(caught) == (0 if ok else 1) and [v == "ok" for v in rows(tmp_path).values()] == [ok]
