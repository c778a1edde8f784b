"""Every kind of tile on a CUDA GPU, over the layers whose candidates hold it: against fp64, and the same bits twice."""

import pytest
import torch

from fused_resnet import numerics
from fused_resnet.bench.session import precision
from fused_resnet.kernels.triton import conv_bn_act, tiles
from fused_resnet.testing import cases, inputs

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
