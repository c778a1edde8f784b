"""Tiles of conv_dgrad and conv_wgrad, compiled without a GPU for sm_80 and sm_90: instructions, no spills, memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_resnet.kernels.triton import grad, legal
from tests.gate import compile_grads

CASES = compile_grads.cases()
ROOT = Path(__file__).parents[2]
WORKERS = 2


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """name -> what the compiler made of it; compiled afresh, in processes where Triton does not interpret."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    folder = tmp_path_factory.mktemp("reports")
    workers = []
    for share in range(WORKERS):
        with open(folder / f"{share}.jsonl", "w") as out, open(folder / f"{share}.err", "w") as err:
            command = [sys.executable, "-m", compile_grads.__name__, str(share), str(WORKERS)]
            workers.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err))
    rows = {}
    for share, worker in enumerate(workers):
        assert worker.wait() == 0, (folder / f"{share}.err").read_text()[-2000:]
        for line in (folder / f"{share}.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows[row.pop("name")] = row
    return rows


def unspilled(report):
    count = report["count"]
    return count["LDL"] + count["STL"] + report["spill_bytes"] + report["stack_bytes"] == 0


@pytest.mark.parametrize(("arch", "problem", "through", "tile"), CASES,
                         ids=[compile_grads.name(*case) for case in CASES])
def test_shipped_tile(arch, problem, through, tile, reports):
    report = reports[compile_grads.name(arch, problem, through, tile)]
    assert "error" not in report, report["error"]
    found = {name for name in ("HGMMA", "HMMA") if report["count"][name]}
    assert found == {tile.instruction(problem.dtype, arch)} - {""}, "tensor-core instructions"
    assert unspilled(report), "registers spilled"
    single = tile.kernel == "dgrad" and problem.R * problem.S == 1 and problem.K // problem.groups <= tile.BLOCK_K
    assert report["count"]["LDGSTS"] or single, "nothing is loaded ahead"
    assert not report["serialized"], "ptxas serialised the wgmma pipeline"
    assert report["shared_bytes"] <= grad.shared(tile, problem), "`legal` judges by an estimate that is too low"


@pytest.mark.parametrize("arch", compile_grads.ARCHS)
@pytest.mark.parametrize("parts", compile_grads.PARTS)
def test_the_launch_that_adds_up_parts(arch, parts, reports):
    report = reports[f"sm_{arch}-sum{parts}"]
    assert unspilled(report), "registers spilled"
    assert report["shared_bytes"] <= legal.SHARED_LIMIT[arch]


def test_the_cases_reach_every_kind_of_tile():
    kinds = {(arch, legal.dtype_class(problem.dtype), tile.kernel, tile.SWAP) for arch, problem, _, tile in CASES}
    assert {(arch, dtype, kernel, False) for arch in (80, 90) for dtype in ("half", "tf32", "fp32")
            for kernel in compile_grads.KERNELS} | {(90, "half", "dgrad", True)} == kinds
