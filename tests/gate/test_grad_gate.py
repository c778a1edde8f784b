"""Tiles of conv_dgrad and conv_wgrad, compiled without a GPU for sm_80 and sm_90: instructions, no spills, memory."""

import pytest

from fused_resnet.kernels.triton import grad, legal
from tests.gate import compile_grads
from tests.gate.workers import clean, tensor_cores

COMPILED = compile_grads
CASES = compile_grads.cases()


@pytest.mark.parametrize(("arch", "problem", "through", "tile"), CASES,
                         ids=[compile_grads.name(*case) for case in CASES])
def test_shipped_tile(arch, problem, through, tile, reports):
    report = clean(reports[compile_grads.name(arch, problem, through, tile)])
    assert tensor_cores(report) == {tile.instruction(problem.dtype, arch)} - {""}, "tensor-core instructions"
    single = tile.kernel == "dgrad" and problem.R * problem.S == 1 and problem.K // problem.groups <= tile.BLOCK_K
    assert report["count"]["LDGSTS"] or single, "nothing is loaded ahead"
    assert report["shared_bytes"] <= grad.shared(tile, problem), "`legal` judges by an estimate that is too low"


@pytest.mark.parametrize("arch", compile_grads.ARCHS)
@pytest.mark.parametrize("parts", compile_grads.PARTS)
def test_the_launch_that_adds_up_parts(arch, parts, reports):
    report = clean(reports[f"sm_{arch}-sum{parts}"])
    assert report["shared_bytes"] <= legal.SHARED_LIMIT[arch]


def test_the_cases_reach_every_kind_of_tile():
    kinds = {(arch, legal.dtype_class(problem.dtype), tile.kernel, tile.SWAP) for arch, problem, _, tile in CASES}
    assert {(arch, dtype, kernel, False) for arch in (80, 90) for dtype in ("half", "tf32", "fp32")
            for kernel in compile_grads.KERNELS} | {(90, "half", "dgrad", True)} == kinds
