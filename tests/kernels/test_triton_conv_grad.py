"""What conv_dgrad and conv_wgrad share: which tiles and problems they refuse, and which tiles they offer."""

import pytest

from fused_resnet.kernels.triton import conv_dgrad, conv_wgrad
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.testing.cases import conv
from tests.kernels.grads import make

BOTH = pytest.mark.parametrize("kernel", [conv_dgrad, conv_wgrad], ids=["dgrad", "wgrad"])


@pytest.mark.parametrize(("kernel", "tile", "reason"), [
    (conv_dgrad, Tile("dgrad", 24, 16), "24 is no power of two"),
    (conv_dgrad, Tile("gemm", 16, 16), "a tile of 'gemm'"),
    (conv_dgrad, Tile("dgrad", 256, 256), "512 sums in the registers"),
    (conv_dgrad, Tile("dgrad", 16, 16, SPLIT_K=2), "SPLIT_K=2 of 1 steps"),
    (conv_wgrad, Tile("wgrad", 24, 16), "24 is no power of two"),
    (conv_wgrad, Tile("dgrad", 16, 16), "a tile of 'dgrad'"),
    (conv_wgrad, Tile("wgrad", 16, 16, SPLIT_K=3), "SPLIT_K=3 of 2 steps")])
def test_a_tile_that_cannot_run_is_refused_with_its_reason(kernel, tile, reason, device):
    problem = conv(16, 16, 4)._replace(device=device)
    with pytest.raises(ValueError, match=reason):
        kernel.with_tile(vars(tile))(problem, make(problem))


@BOTH
@pytest.mark.parametrize(("change", "reason"), [
    ({"dtype": "fp64"}, "not fp64"), ({"dtype": "bf16"}, "interpreter"), ({"prologue": "silu"}, "'silu'"),
    ({"groups": 16}, "one input channel"), ({}, None), ({"dtype": "bf16", "device": "cuda"}, None)])
def test_refusals(kernel, change, reason):
    found = kernel.refuse(conv(16, 16, 4)._replace(**change))
    assert found is None if reason is None else reason in found


@BOTH
@pytest.mark.parametrize("arch", [80, 86, 90])
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
def test_candidates_are_legal_and_begin_with_the_shipped_tile(kernel, dtype, arch):
    for problem in (conv(64, 64, 56, n=32), conv(256, 64, 56, 1, n=32, prologue="relu"), conv(3, 64, 224, 7, stride=2)):
        problem = problem._replace(device="cuda", dtype=dtype)
        tiles = kernel.candidates(problem, arch)
        assert tiles[0] == kernel.pick(problem, arch) and len(set(tiles)) == len(tiles) > 1
        assert all(kernel.legal(tile, problem, arch) is None for tile in tiles)
