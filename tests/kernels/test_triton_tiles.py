"""The tile table: every problem gets a legal tile on every architecture, and the judge says why not."""

import dataclasses

import pytest

from fused_resnet.kernels.triton import tiles
from fused_resnet.testing.cases import CATALOGUE, LAYERS, conv

ARCHS = (80, 86, 87, 89, 90, 100, 120)
NETWORK_LAYERS = [problem._replace(N=n) for layers in LAYERS.values() for problem, _ in layers for n in (1, 64)]
LEGAL = tiles.Tile("gemm", 64, 64, 32)


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_problem_gets_a_legal_tile(arch, dtype):
    for problem in CATALOGUE + NETWORK_LAYERS:
        problem = problem._replace(dtype=dtype, device="cuda")
        assert tiles.legal(tiles.pick(problem, arch), problem, arch) is None


def test_every_row_can_be_reached_by_its_own_bucket():
    rows = {(kernel, bucket) for kernel, _, _, bucket in tiles.SHIPPED}
    found = {("depthwise" if problem.depthwise else "gemm", tiles.bucket(problem, 90))
             for problem in [*CATALOGUE, *NETWORK_LAYERS, conv(64, 64, 56, n=64, prologue="relu")]}
    assert found == rows


def test_windows_keep_four_warps_on_hopper():
    assert all(tile.num_warps == 4 for (_, arch, _, bucket), tile in tiles.SHIPPED.items()
               if arch == 90 and bucket != "pointwise")


@pytest.mark.parametrize(("change", "problem", "arch", "reason"), [
    ({}, {}, 75, "older than sm_80"), ({"kernel": "magic"}, {}, 80, "no kernel 'magic'"),
    ({"kernel": "depthwise"}, {}, 80, "one input channel"), ({"BLOCK_N": 8}, {}, 80, "BLOCK_N=8"),
    ({"num_warps": 3}, {}, 80, "num_warps=3"), ({"BLOCK_M": 512}, {}, 80, "256 sums"),
    ({"SWAP": True}, {"prologue": "relu"}, 80, "prologue"), ({"BLOCK_M": 32}, {"dtype": "bf16"}, 90, "64 rows"),
    ({"num_warps": 2, "BLOCK_M": 64}, {"dtype": "bf16"}, 90, "4 warps"),
    ({"BLOCK_K": 128, "num_stages": 2}, {}, 86, "bytes of shared memory"), ({}, {"dtype": "bf16"}, 90, None)])
def test_reasons(change, problem, arch, reason):
    found = tiles.legal(dataclasses.replace(LEGAL, **change), conv(64, 64, 8)._replace(**problem), arch)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("channels", "block"), [(64, 64), (96, 32), (48, 32), (16, 16), (17, 32), (512, 64)])
def test_the_reduction_is_trimmed_to_the_channels(channels, block):
    problem = conv(channels, 64, 56, n=64)._replace(dtype="bf16", device="cuda")
    assert tiles.pick(problem, 90).BLOCK_K == block
