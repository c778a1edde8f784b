"""The tile table: every problem gets a legal tile on every architecture, and the judge says why not."""

import dataclasses

import pytest

from fused_resnet.kernels.triton import legal, tiles
from fused_resnet.testing.cases import CATALOGUE, LAYERS, conv

ARCHS = (80, 86, 87, 89, 90, 100, 120)
NETWORK_LAYERS = [problem._replace(N=n) for layers in LAYERS.values() for problem, _ in layers for n in (1, 64)]
TMA = {"kernel": "box", "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
WS = {**TMA, "kernel": "ws"}
HALF = {"dtype": "bf16", "device": "cuda"}
LEGAL = legal.Tile("gemm", 64, 64, 32)


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_problem_gets_a_legal_tile(arch, dtype):
    for problem in CATALOGUE + NETWORK_LAYERS:
        problem = problem._replace(dtype=dtype, device="cuda")
        assert legal.legal(tiles.pick(problem, arch), problem, arch) is None


def test_every_row_can_be_reached_by_its_own_bucket():
    rows = {(kernel, bucket) for kernel, _, _, bucket in tiles.SHIPPED}
    found = {(tiles.pick(problem, 90).kernel, tiles.bucket(problem, 90))
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
    ({"BLOCK_K": 128, "num_stages": 2}, {}, 86, "bytes of shared memory"), ({}, {"dtype": "bf16"}, 90, None),
    ({"SPLIT_K": 64}, {}, 90, "SPLIT_K=64 of 18 steps"), ({"SPLIT_K": 4}, {}, 80, None),
    ({**TMA, "SPLIT_K": 2}, {}, 90, None), ({**TMA, "SPLIT_K": 19}, {}, 90, "SPLIT_K=19 of 18 steps"),
    ({"kernel": "grouped", "SPLIT_K": 2}, {"groups": 8}, 90, "steps of the kernel grouped"),
    (TMA, {}, 90, None), (TMA, {}, 80, "not on sm_80"), ({**TMA, "SWAP": True}, {}, 90, None),
    (TMA, {"groups": 2}, 90, "BLOCK_N=64 does not divide the 32"), ({**TMA, "BLOCK_N": 32}, {"groups": 2}, 90, None),
    ({**TMA, "BLOCK_M": 256}, {"dtype": "bf16", "prologue": "relu"}, 90, "beside a prologue"),
    (TMA, {"groups": 4}, 90, "does not divide 16 channels"), (TMA, {"prologue": "relu"}, 90, None),
    ({**TMA, "SWAP": True}, {"prologue": "relu"}, 90, "prologue"), (TMA, {"N": 1 << 25}, 90, "has 32 bits"),
    ({**TMA, "kernel": "gemm1x1"}, {"R": 1, "S": 1, "groups": 2}, 90, "one group"),
    (TMA, {"C": 36, "dtype": "bf16"}, 90, "36 -> 64 channels"), (TMA, {"C": 48}, 90, "does not divide 48"),
    (TMA, {"stride": (2, 2)}, 90, None), (TMA, {"stride": (2, 2), "H": 9}, 90, "stride 2 does not divide 9"),
    (TMA, {"device": "cuda"}, 90, "spills"), ({**TMA, "kernel": "gemm1x1"}, {}, 90, "one tap"),
    ({**TMA, "BLOCK_M": 256, "BLOCK_N": 128, "num_warps": 8}, {"dtype": "bf16", "residual": True}, 90, "spill"),
    ({**TMA, "BLOCK_M": 256, "BLOCK_N": 128, "num_warps": 8, "SWAP": True}, {"dtype": "bf16", "residual": True}, 90,
     None),
    (WS, {}, 90, None), (WS, {}, 80, "not on sm_80"), (WS, {"groups": 2}, 90, "no groups"),
    (WS, {"prologue": "relu"}, 90, "no groups and no prologue"), ({**WS, "SPLIT_K": 2}, {}, 90, "of the kernel ws"),
    ({**WS, "BLOCK_K": 64}, {}, 90, "BLOCK_K=64"), ({**WS, "num_stages": 9}, {}, 90, "9 stages"),
    ({**WS, "num_warps": 8}, HALF, 90, "8 warps do not share 64 rows"), (WS, {**HALF, "C": 36}, 90, "36 -> 64"),
    ({**WS, "BLOCK_M": 512, "BLOCK_N": 16, "num_stages": 2}, {}, 90, "512 x 16"), (WS, {"C": 48}, 90, "divide 48"),
    ({**WS, "BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}, HALF, 90,
     "263168 bytes of shared memory"), (WS, {"device": "cuda"}, 90, "fp32 without tensor cores"),
    ({**WS, "BLOCK_M": 128, "BLOCK_N": 128}, {**HALF, "residual": True}, 90, "128 sums of a thread spill"),
    ({**WS, "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8}, {**HALF, "residual": True}, 90, None),
    ({**WS, "BLOCK_M": 128, "BLOCK_N": 256, "num_warps": 8}, HALF, 90, "scales and shifts of 256"),
    ({**WS, "BLOCK_M": 128, "BLOCK_N": 256, "num_warps": 8, "SWAP": True}, {**HALF, "residual": True}, 90, None),
    ({"BLOCK_M": 128, "BLOCK_N": 128}, {"device": "cuda", "residual": True, "dtype": "bf16"}, 90, "beside a residual"),
    ({"BLOCK_M": 128, "BLOCK_N": 128}, {"device": "cuda", "dtype": "bf16"}, 90, None),
    ({"kernel": "grouped"}, {"groups": 2}, 90, "fit BLOCK_K=32 twice"),
    ({"kernel": "grouped"}, {"groups": 8}, 90, "BLOCK_N=64 is not"),
    ({"kernel": "grouped", "BLOCK_N": 32}, {"groups": 8}, 90, None)])
def test_reasons(change, problem, arch, reason):
    found = legal.legal(dataclasses.replace(LEGAL, **change), conv(64, 64, 8)._replace(**problem), arch)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("channels", "block"), [(64, 64), (96, 32), (48, 32), (16, 16), (17, 32), (512, 64)])
def test_the_reduction_is_trimmed_to_the_channels(channels, block):
    problem = conv(channels, 64, 56, n=64)._replace(dtype="bf16", device="cuda")
    assert tiles.pick(problem, 90).BLOCK_K == block


@pytest.mark.parametrize(("problem", "box"), [
    (conv(64, 64, 56, n=64), (2, 8, 8)), (conv(64, 64, 28, n=64), (8, 4, 4)), (conv(64, 64, 14, n=64), (32, 2, 2)),
    (conv(64, 64, 7, n=256), (128, 1, 1)), (conv(64, 64, (1, 300), n=1), (1, 1, 128))], ids=lambda v: str(v)[:60])
def test_a_box_wastes_no_pixels_where_it_need_not(problem, box):
    assert legal.box(problem, 128) == box


@pytest.mark.parametrize(("channels", "groups", "block"), [(128, 32, 64), (256, 32, 64), (512, 32, 64), (1024, 32, 0),
                                                           (256, 32, 64), (64, 16, 64), (48, 3, 0), (40, 5, 0)])
def test_narrow_groups_share_a_product(channels, groups, block):
    problem = conv(channels, channels, 14, n=32, groups=groups)._replace(dtype="bf16", device="cuda")
    tile = tiles.pick(problem, 90)
    assert (tile.BLOCK_N, tile.BLOCK_K) == (block, block) if block else tile.kernel == "gemm"


@pytest.mark.parametrize(("problem", "parts"), [(conv(512, 512, 7, n=1), 8), (conv(256, 256, 14, n=1), 4),
                                                (conv(64, 64, 56, n=1), 1), (conv(512, 512, 7, n=64), 1)])
def test_a_reduction_is_split_where_tiles_are_few_and_steps_many(problem, parts):
    assert tiles.pick(problem._replace(dtype="bf16", device="cuda"), 90).SPLIT_K == parts


@pytest.mark.parametrize("arch", [80, 90])
def test_candidates_are_legal_distinct_and_begin_with_the_shipped_tile(arch):
    kernels = set()
    for problem in NETWORK_LAYERS + CATALOGUE:
        problem = problem._replace(dtype="bf16", device="cuda")
        found = tiles.candidates(problem, arch)
        assert found[0] == tiles.pick(problem, arch)
        assert len(set(found)) == len(found)
        assert not any(legal.legal(tile, problem, arch) for tile in found)
        kernels |= {tile.kernel for tile in found}
    assert kernels == {"gemm", "grouped", "depthwise", *((*legal.TMA, legal.WS) if arch == 90 else ())}
