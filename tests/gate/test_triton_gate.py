"""Every shipped tile, compiled without a GPU for sm_80 and sm_90: the instructions it declares, no spills, memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_resnet.kernels.triton import legal, stem, tiles
from fused_resnet.testing import aot
from tests.gate import compile_tiles

CASES = compile_tiles.cases()
# Those that tuning may choose as well.
CANDIDATES = [case for case in compile_tiles.candidates() if case not in CASES]
STEMS = compile_tiles.stems()
ROOT = Path(__file__).parents[2]
WORKERS = 2


@pytest.fixture(scope="session")
def reports(tmp_path_factory):
    """name -> what the compiler made of it; compiled afresh, in processes where Triton does not interpret."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    folder = tmp_path_factory.mktemp("reports")
    workers = []
    for share in range(WORKERS):
        with open(folder / f"{share}.jsonl", "w") as out, open(folder / f"{share}.err", "w") as err:
            command = [sys.executable, "-m", compile_tiles.__name__, str(share), str(WORKERS)]
            workers.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err))
    rows = {}
    for share, worker in enumerate(workers):
        assert worker.wait() == 0, (folder / f"{share}.err").read_text()[-2000:]
        for line in (folder / f"{share}.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows[row.pop("name")] = row
    return rows


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
    report = reports[compile_tiles.name(arch, problem, tile)]
    assert "error" not in report, report["error"]
    count = report["count"]
    found = {name for name in ("HGMMA", "HMMA") if count[name]}
    assert found == {tile.instruction(problem.dtype, arch)} - {""}, "tensor-core instructions"
    assert count["LDL"] + count["STL"] + report["spill_bytes"] + report["stack_bytes"] == 0, "registers spilled"
    assert not report["serialized"], "ptxas serialised the wgmma pipeline"
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
    report = reports[compile_tiles.name(arch, problem, tile)]
    assert "error" not in report, report["error"]
    count = report["count"]
    instruction = "" if problem.dtype == "fp32" else "HGMMA" if arch == 90 else "HMMA"
    assert {name for name in ("HGMMA", "HMMA") if count[name]} == {instruction} - {""}, "tensor-core instructions"
    assert count["LDL"] + count["STL"] + report["spill_bytes"] + report["stack_bytes"] == 0, "registers spilled"
    assert count["LDGSTS"], "the image is not loaded ahead"
    assert not report["serialized"], "ptxas serialised the wgmma pipeline"
    assert report["shared_bytes"] <= stem.shared(tile, problem, arch), "`legal` judges by an estimate that is too low"
    assert report["shared_bytes"] <= legal.SHARED_LIMIT[legal.arch_class(arch)]
