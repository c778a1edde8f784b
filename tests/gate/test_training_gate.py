"""The kernels of bn_act* and conv_bn_stats, compiled for sm_80 and sm_90: no spills, 16-byte loads, tensor cores."""

import pytest

from fused_resnet.kernels.triton import conv_bn_stats, legal
from tests.gate import compile_training
from tests.gate.workers import clean, tensor_cores

COMPILED = compile_training
CASES = compile_training.cases()
NORMS = [case for case in CASES if case[0] in ("forward", "sums", "grad")]
CONVS = [case for case in CASES if case[0] == "conv"]
REST = [case for case in CASES if case not in NORMS + CONVS]


def cases(which):
    return pytest.mark.parametrize(("kernel", "arch", "problem", "tile"), which,
                                   ids=[compile_training.name(*case) for case in which])


def compiled(reports, kernel, arch, problem, tile):
    """The report of a launch that compiled, keeps everything in registers and fits."""
    report = clean(reports[compile_training.name(kernel, arch, problem, tile)])
    assert report["shared_bytes"] <= legal.SHARED_LIMIT[legal.arch_class(arch)]
    return report


@cases(NORMS)
def test_norm(kernel, arch, problem, tile, reports):
    report = compiled(reports, kernel, arch, problem, tile)
    count = report["count"]
    assert report["registers"] <= 168, "fewer than three programs of four warps fit a multiprocessor"
    if problem.C % 8:
        return
    stores = {"forward": 1, "sums": 0, "grad": 1 + bool(problem.shortcut)}[kernel]
    reads = {"forward": 1 + bool(problem.shortcut), "sums": 2 + (problem.shortcut == "norm"),
             "grad": 2 + (problem.shortcut == "norm")}[kernel]
    each = tile.BLOCK_M * tile.BLOCK_C * (4 if problem.dtype == "fp32" else 2) // (16 * 32 * tile.num_warps)
    assert each == 2
    assert count["STG.E.128"] == stores * each, "images are not stored 16 bytes at a time"
    assert count["LDG.E.128"] >= reads * each, "images are not loaded 16 bytes at a time"
    if kernel == "grad":
        assert count["STG."] == count["STG.E.128"]


@cases(CONVS)
def test_convolution(kernel, arch, problem, tile, reports):
    report = compiled(reports, kernel, arch, problem, tile)
    assert tensor_cores(report) == {tile.instruction(problem.dtype, arch)} - {""}, "tensor-core instructions"
    assert report["shared_bytes"] <= conv_bn_stats.shared_memory(tile, problem), "`lawful` estimates too low"
    stores = report["count"]["STG.E.128" if tile.kernel != "gemm1x1" else "UTMASTG"]
    assert stores, "u is not stored 16 bytes at a time, or by a descriptor"
    assert conv_bn_stats.lawful(tile, problem, arch) is None


@cases(REST)
def test_small_launch(kernel, arch, problem, tile, reports):
    compiled(reports, kernel, arch, problem, tile)
