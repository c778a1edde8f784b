"""The candidate tiles "ws" of representative layers, compiled for sm_90: what warps that specialise must become."""

import pytest

from fused_resnet.kernels.triton import legal, tiles
from fused_resnet.testing.cases import LAYERS
from tests.gate import compile_ws
from tests.gate.workers import clean, tensor_cores

COMPILED = compile_ws
CASES = compile_ws.cases()


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
    report = clean(reports[compile_ws.name(problem, tile)])
    count = report["count"]
    assert tensor_cores(report) == {"HGMMA"}, "tensor-core instructions"
    assert report["from_registers"] == 0, "wgmma reads both operands from shared memory"
    assert count["UTMALDG"] >= 2 + problem.residual and count["UTMASTG"], "copies through tensor descriptors"
    assert report["partitions"] == 2 and report["reassigned"], "two loading warps that give registers up"
    assert report["shared_bytes"] <= tile.shared(problem), "`legal` judges by an estimate that is too low"
    assert tile.shared(problem) <= legal.SHARED_LIMIT[90]
