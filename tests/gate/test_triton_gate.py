"""Every shipped tile, compiled without a GPU for sm_80 and sm_90: the instructions it declares, no spills, memory."""

import pytest

from fused_resnet.kernels.triton import legal, stem, tiles
from fused_resnet.testing import aot
from tests.gate import compile_tiles
from tests.gate.workers import clean, tensor_cores

COMPILED = compile_tiles
CASES = compile_tiles.cases()
# Those that tuning may choose as well.
CANDIDATES = [case for case in compile_tiles.candidates() if case not in CASES]
STEMS = compile_tiles.stems()


def test_the_cases_cover_every_row_of_the_table():
    for bucket, arch, problem, tile in CASES:
        if tile.kernel not in legal.TMA:
            assert tiles.bucket(problem, arch) == bucket, f"{problem.id} is no longer {bucket} on sm_{arch}"
    covered = {(arch, legal.dtype_class(problem.dtype), bucket) for bucket, arch, problem, _ in CASES}
    assert {(arch, dtype, bucket) for _, arch, dtype, bucket in tiles.SHIPPED} <= covered
    assert {tile.kernel for *_, tile in CASES} == {"gemm", "grouped", "depthwise", *legal.TMA}
    assert any(tile.SPLIT_K > 1 for *_, tile in CASES)


def test_a_kernel_made_for_the_interpreter_is_not_compiled():
    with pytest.raises(TypeError, match="TRITON_INTERPRET"):
        aot.build(lambda: None, {}, 90, {})


@pytest.mark.parametrize(("arch", "problem", "tile"), [case[1:] for case in CASES + CANDIDATES],
                         ids=[f"{bucket}-{compile_tiles.name(*case)}" for bucket, *case in CASES + CANDIDATES])
def test_tile(arch, problem, tile, reports):
    report = clean(reports[compile_tiles.name(arch, problem, tile)])
    count = report["count"]
    assert tensor_cores(report) == {tile.instruction(problem.dtype, arch)} - {""}, "tensor-core instructions"
    # What serves sm_80 serves the chips with less shared memory too, wherever `legal` says so.
    for other in {arch} | ({86, 89} if arch == 80 else set()):
        if legal.legal(tile, problem, other) is None:
            assert report["shared_bytes"] <= legal.SHARED_LIMIT[legal.arch_class(other)]
    assert bool(count["UTMALDG"]) == (tile.kernel in legal.TMA), "loads through tensor descriptors"
    # A box of pixels that is the first operand is reshaped in registers, where a prologue changes pixels, too.
    if count["HGMMA"]:
        through = (tile.kernel == "box" and not tile.SWAP) or bool(problem.prologue)
        assert bool(report["from_registers"]) == through, "where wgmma reads its first operand"
    if tile.kernel != "depthwise":
        assert report["shared_bytes"] <= tile.shared(problem), "`legal` judges by an estimate that is too low"


def test_the_candidates_cover_every_form():
    forms = {(tile.kernel, tile.SWAP, tile.SPLIT_K > 1, problem.dtype) for *_, problem, tile in CANDIDATES}
    assert {(kernel, swap, split, dtype) for kernel in legal.TMA for swap, split in ((False, False), (True, False),
            (True, True)) for dtype in ("bf16", "tf32")} <= forms
    assert any(problem.groups > 1 for *_, problem, tile in CANDIDATES if tile.kernel == "box")
    assert {tile.kernel for *_, problem, tile in CANDIDATES if problem.prologue} >= set(legal.TMA)


def test_the_stems_cover_every_shipped_tile():
    assert {(legal.arch_class(arch), legal.dtype_class(problem.dtype)) for arch, problem, _ in STEMS} == set(stem.TILES)


@pytest.mark.parametrize(("arch", "problem", "tile"), STEMS, ids=[compile_tiles.name(*case) for case in STEMS])
def test_stem(arch, problem, tile, reports):
    report = clean(reports[compile_tiles.name(arch, problem, tile)])
    count = report["count"]
    instruction = "" if problem.dtype == "fp32" else "HGMMA" if arch == 90 else "HMMA"
    assert tensor_cores(report) == {instruction} - {""}, "tensor-core instructions"
    assert count["LDGSTS"], "the image is not loaded ahead"
    assert report["shared_bytes"] <= stem.shared(tile, problem, arch), "`legal` judges by an estimate that is too low"
    assert report["shared_bytes"] <= legal.SHARED_LIMIT[legal.arch_class(arch)]
