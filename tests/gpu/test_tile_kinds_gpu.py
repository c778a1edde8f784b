"""Every kind of tile on a CUDA GPU, over the layers whose candidates hold it: against fp64, and the same bits twice.

Of the native library every tile on every layer that it fits, with a residual and with odd sizes, too.
"""

import pytest
import torch

from benchmarks.check import check_one
from fused_resnet import backends, native, numerics
from fused_resnet.bench.session import precision
from fused_resnet.kernels.cuda import conv_bn_act as compiled
from fused_resnet.kernels.triton import conv_bn_act, tiles
from fused_resnet.testing import cases, inputs
from tests.gpu.conftest import here

LAYERS = [problem for name in ("resnet50", "resnext50_32x4d") for problem, _ in cases.LAYERS[name]]


@pytest.mark.parametrize("kind", ["gemm1x1", "box", "ws", "split", "grouped"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32"])
def test_the_last_candidate_of_each_layer(kind, dtype):
    major, minor = torch.cuda.get_device_capability()
    ran = 0
    for problem in dict.fromkeys(LAYERS):
        problem = problem._replace(device="cuda", dtype=dtype, N=1 if kind == "split" else 3)
        found = [tile for tile in tiles.candidates(problem, 10 * major + minor)
                 if tile.kernel == kind or (kind == "split" and tile.SPLIT_K > 1)]
        # Of warps that specialise every shape of tile gets its turn, one a layer.
        for tile in found[ran % len(found):][:1] if kind == "ws" and found else found[-1:]:
            ran += 1
            with torch.no_grad(), precision(dtype):
                operands = inputs.make(problem)
                result, again = (conv_bn_act.forward(problem, operands, tile) for _ in range(2))
                bound = numerics.check(result, inputs.stock(problem, operands),
                                       inputs.stock(problem, operands, torch.float64), dtype=dtype, depth=problem.depth)
            assert bound.ok, f"{problem.id} {tile}: {bound}"
            assert torch.equal(result, again), f"{problem.id} {tile}: two runs differ"
    if not ran and tiles.arch_class(10 * major + minor) != 90:
        pytest.skip("tensor descriptors are used on sm_90 only")
    assert ran


ODD = [cases.conv(72, 136, (7, 5), residual=True, n=3), cases.conv(64, 72, 9, stride=2, bias=True, n=3),
       cases.conv(8, 200, 6, 5, dilation=(2, 1), activation="silu", n=5), cases.conv(136, 264, 1, 1, residual=True)]


@pytest.mark.parametrize("name", native.CONV_TILES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_librarys_tiles(name, dtype):
    """Error against fp64, NaN-poisoned outputs, guard bands, the same bits twice."""
    here("cuda")
    major, minor = torch.cuda.get_device_capability()
    tile, ran = compiled.Tile.named(name), 0
    for problem in dict.fromkeys([*ODD, *(p._replace(N=3) for p in LAYERS)]):
        problem = problem._replace(device="cuda", dtype=dtype)
        if compiled.legal(tile, problem, 10 * major + minor) is None:
            ran += 1
            row, = check_one(problem, "cuda", tile)
            assert row["status"] == "ok", f"{problem.id} {name}: {row['detail']}"
    if not ran:
        pytest.skip(compiled.legal(tile, ODD[0]._replace(device="cuda", dtype=dtype), 10 * major + minor))


def test_a_tile_of_the_library_runs_where_images_and_residuals_begin_between_two_loads():
    here("cuda")
    problem = cases.conv(64, 64, 7, residual=True)._replace(device="cuda", dtype="bf16")
    operands = inputs.make(problem)

    def moved(t):
        row = torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")[1:]
        return row.view(t.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).copy_(t)

    elsewhere = operands._replace(x=moved(operands.x), residual=moved(operands.residual))
    for tile in compiled.candidates(problem):
        expected = compiled.forward(problem, operands, tile)
        assert torch.equal(compiled.forward(problem, elsewhere, tile), expected), str(tile)


def test_forced_on_a_gpu_the_library_runs_a_layer():
    here("cuda")
    problem = LAYERS[1]._replace(device="cuda", dtype="bf16", N=2)
    with backends.use("cuda"), torch.no_grad():
        choice = backends.choose("conv_bn_act", problem)
        assert (choice.name, choice.label) == ("cuda", "forced")
        backends.run("conv_bn_act", problem, inputs.make(problem))
        assert backends.last() == "cuda"
