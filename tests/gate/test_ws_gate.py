"""The candidate tiles "ws" of representative layers, compiled for sm_90: what warps that specialise must become."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_resnet.kernels.triton import legal, tiles
from fused_resnet.testing.cases import LAYERS
from tests.gate import compile_ws

CASES = compile_ws.cases()
ROOT = Path(__file__).parents[2]
WORKERS = 2


@pytest.fixture(scope="session")
def reports(tmp_path_factory):
    """name -> what the compiler made of it, from processes where Triton does not interpret."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    folder = tmp_path_factory.mktemp("reports")
    workers = []
    for share in range(WORKERS):
        with open(folder / f"{share}.jsonl", "w") as out, open(folder / f"{share}.err", "w") as err:
            command = [sys.executable, "-m", compile_ws.__name__, str(share), str(WORKERS)]
            workers.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err))
    for share, worker in enumerate(workers):
        assert worker.wait() == 0, (folder / f"{share}.err").read_text()[-2000:]
    lines = [line for share in range(WORKERS) for line in (folder / f"{share}.jsonl").read_text().splitlines()]
    return {row["name"]: row for row in map(json.loads, lines)}


def test_the_layers_hold_every_shape_that_a_network_s_candidates_have():
    def shape(problem, tile):
        return tile.BLOCK_M, tile.BLOCK_N, tile.SWAP, tile.num_warps, tile.num_stages, problem.residual

    networks = {problem._replace(dtype="bf16", device="cuda", N=64) for name in ("resnet18", "resnet50")
                for problem, _ in LAYERS[name]}
    wanted = {shape(problem, tile) for problem in networks for tile in tiles.candidates(problem, 90)
              if tile.kernel == legal.WS}
    assert wanted and wanted <= {shape(*case) for case in CASES if case[0].dtype == "bf16"}


@pytest.mark.parametrize(("problem", "tile"), CASES, ids=[compile_ws.name(*case) for case in CASES])
def test_candidate(problem, tile, reports):
    report = reports[compile_ws.name(problem, tile)]
    assert "error" not in report, report["error"]
    count = report["count"]
    assert count["HGMMA"] and not count["HMMA"], "tensor-core instructions"
    assert report["from_registers"] == 0, "wgmma reads both operands from shared memory"
    assert count["UTMALDG"] >= 2 + problem.residual and count["UTMASTG"], "copies through tensor descriptors"
    assert count["LDL"] + count["STL"] + report["spill_bytes"] + report["stack_bytes"] == 0, "registers spilled"
    assert report["partitions"] == 2 and report["reassigned"], "two loading warps that give registers up"
    assert not report["serialized"], "ptxas serialised the wgmma pipeline"
    assert report["shared_bytes"] <= tile.shared(problem), "`legal` judges by an estimate that is too low"
    assert tile.shared(problem) <= legal.SHARED_LIMIT[90]
