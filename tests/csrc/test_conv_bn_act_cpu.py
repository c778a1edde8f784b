"""The CPU's kernels of the family conv_bn_act: who may run what, which tile by default, forced ones, fresh weights."""

import pytest
import torch

from fused_resnet import backends
from fused_resnet.kernels.cpu import conv_bn_act as kernel
from fused_resnet.kernels.cpu import packed
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import conv
from tests.kernels.judge import agree, guarded_run
from tests.test_backends import FAMILY, fresh, launch  # noqa: F401  `fresh` is a fixture

pytestmark = pytest.mark.usefixtures("library")
DENSE = conv(32, 48, (9, 10), residual=True)
ALL = ["onednn", "direct", "winograd4", "winograd2"]
RUNS = [(conv(16, 32, 9), ALL), (DENSE._replace(activation="silu"), ALL), (conv(16, 32, 9, padding=(0, 2)), ALL),
        (conv(16, 32, 9, prologue="relu"), ALL), (conv(16, 32, 9, stride=2), ALL[:2]), (conv(16, 32, 9, 1), ALL[:2]),
        (conv(16, 32, 9, dilation=2), ALL[:2]), (conv(32, 32, 9, groups=2), ALL[:2]), (conv(24, 32, 9), ALL[:2]),
        (conv(16, 17, 9), ALL[:2]), (conv(16, 32, 9, (3, 1)), ALL[:2]),
        (DENSE._replace(dtype="fp64"), []), (DENSE._replace(N=2**30), ALL[:1])]


def names(problem):
    return [tile.kernel for tile in kernel.candidates(problem)]


@pytest.mark.parametrize(("problem", "able"), RUNS, ids=[problem.id for problem, _ in RUNS])
def test_who_may_run_what(problem, able):
    assert names(problem) == able and (kernel.refuse(problem) is None) == bool(able)


def test_fp16_is_left_to_onednn():
    assert not set(names(DENSE._replace(dtype="fp16"))) & set(packed.METHODS)


def test_bf16_needs_no_processor_with_bf16(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    problem = DENSE._replace(dtype="bf16")
    assert names(problem) == ALL[1:] and kernel.refuse(problem) is None
    assert kernel.default(problem)["kernel"] in ALL[1:]


def test_winograd_can_be_switched_off(fresh):  # noqa: F811
    backends.adopt(FAMILY, DENSE, {"backend": "cpu", "tile": {"kernel": "winograd4"}})
    assert backends.choose(FAMILY, DENSE).tile == {"kernel": "winograd4"}
    fresh(WINOGRAD="0")
    assert names(DENSE) == ALL[:2] and "FUSED_RESNET_WINOGRAD=0" in packed.refuse(DENSE, "winograd2")
    with pytest.warns(UserWarning, match="ignores the tuned row"):
        choice = backends.choose(FAMILY, DENSE)
    assert choice.label == "heuristic" and choice.tile["kernel"] in ALL[:2]


def test_without_the_library_onednn_runs_all(monkeypatch):
    monkeypatch.setattr(packed.native, "refusal", lambda part: "it was not built")
    assert names(DENSE) == ["onednn"] and kernel.default(DENSE) == {"kernel": "onednn"}


@pytest.mark.parametrize("problem", [problem for problem, able in RUNS if able], ids=lambda problem: problem.id)
def test_the_default_is_one_of_the_candidates(problem):
    assert kernel.default(problem)["kernel"] in names(problem)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_tile_is_right_between_guard_bands(name, dtype):
    """With and without a prologue, which is a pass of its own; into the residual, too."""
    for problem in (DENSE, conv(16, 32, 7, prologue="relu", bias=True)):
        p = problem._replace(dtype=dtype)
        if name not in names(p):
            pytest.skip(f"{name} cannot run {p.id}")
        o, forward = inputs.make(p), kernel.with_tile({"kernel": name})
        result = guarded_run(forward, p, o)
        if name != "onednn" or dtype == "fp32":  # oneDNN folds the norm into weights of 16 bits
            agree(p, o, result)
        if p.residual:
            own = o.residual.clone(memory_format=torch.preserve_format)
            into = forward(p, o._replace(residual=own, reuse=True))
            assert into.data_ptr() == own.data_ptr()
            assert name == "onednn" or torch.equal(into, result)


@pytest.mark.parametrize("name", ALL)
def test_a_tuned_row_decides(fresh, monkeypatch, name):  # noqa: F811
    ran, run = [], kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda p, o, tile=None: ran.append(tile.kernel) or run(p, o, tile))
    backends.adopt(FAMILY, DENSE, {"backend": "cpu", "tile": {"kernel": name}})
    choice = backends.choose(FAMILY, DENSE)
    assert (choice.label, choice.tile) == ("tuned", {"kernel": name})
    agree(DENSE, inputs.make(DENSE), launch(DENSE))
    assert ran == [name] and choice.trusted


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("field", ["weight", "bias", "gamma", "beta", "mean", "var"])
def test_what_changes_in_place_is_packed_again(name, field):
    p = DENSE._replace(bias=True)
    o, forward = inputs.make(p), kernel.with_tile({"kernel": name})
    before = forward(p, o)
    assert torch.equal(before, forward(p, o))
    getattr(o, field).mul_(1.5)
    after = forward(p, o)
    agree(p, o, after)
    assert not torch.equal(before, after)


def test_the_pack_is_kept_while_nothing_changes(monkeypatch):
    packs, build = [], packed._pack
    monkeypatch.setattr(packed, "_pack", lambda *args: packs.append(args[3]) or build(*args))
    o = inputs.make(DENSE)
    for name in ("direct", "winograd2", "winograd4"):
        forward = kernel.with_tile({"kernel": name})
        for n in (2, 1, 2):
            p = DENSE._replace(N=n)
            forward(p, o._replace(x=o.x[:n], residual=o.residual[:n]))
    assert packs == ["direct", "winograd2", "winograd4"]


@pytest.mark.parametrize("name", packed.METHODS)
def test_fp32_weights_beside_bf16_data_are_rounded_as_autocast_does(name):
    p = DENSE._replace(dtype="bf16", K=DENSE.C, groups=DENSE.C // 4 if name == "grouped" else 1)
    o = inputs.make(p)
    wide = o._replace(weight=o.weight.float() * (1 + 2**-12))
    result = kernel.with_tile({"kernel": name})(p, wide)
    rounded = wide._replace(weight=wide.weight.bfloat16())
    assert torch.equal(result, kernel.with_tile({"kernel": name})(p, rounded))
    agree(p, rounded, result)


def test_nan_runs_what_stock_runs(fresh):  # noqa: F811
    """Whatever the tile: Winograd's would carry NaN to other pixels, oneDNN's ReLU would drop it."""
    o = inputs.make(DENSE)
    o.x[0, 3, 4, 5] = float("nan")
    with torch.no_grad():
        from fused_resnet.ops import conv_bn_act as family

        for name in ALL:
            backends.adopt(FAMILY, DENSE, {"backend": "cpu", "tile": {"kernel": name}})
            result = family.OP(*inputs.arguments(DENSE, o))
            assert torch.equal(result.isnan(), inputs.stock(DENSE, o).isnan()), name
