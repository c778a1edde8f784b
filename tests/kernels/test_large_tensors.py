"""Tensors of more than 2^31 elements, of which the last tile is computed: offsets that need 64 bits.

The interpreter runs the last programs only and memory that nobody touches costs nothing, so that this takes no
more than address space. A GPU runs them all.
"""

import pytest
import torch

from fused_resnet.kernels.triton import conv_bn_act, legal, stem
from fused_resnet.kernels.triton import conv_bn_act_tma as tma
from fused_resnet.kernels.triton.launch import launch
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.ops.stem import StemProblem
from fused_resnet.problem import ConvOperands
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import conv
from tests.kernels.judge import agree
from tests.kernels.test_triton_stem import stock as stem_stock

EDGE, LAST = 2**31, 16  # elements of a tensor; pixels that are compared
WIDE = [
    ("x", conv(64, 16, (4, EDGE // 256 + 3), n=1), Tile("gemm", 64, 16, 64)),
    ("x", conv(64, 64, (4, EDGE // 256 + 3), n=1), Tile("gemm", 64, 64, 64, SWAP=True)),
    ("x", conv(128, 16, (1, EDGE // 128 + 3), 1, n=1), Tile("gemm", 64, 16, 64)),
    ("y", conv(16, 128, (2, EDGE // 256 + 3), n=1, residual=True), Tile("gemm", 64, 64, 16)),
    ("sums", conv(32, 128, (2, EDGE // 512 + 3), n=1), Tile("gemm", 64, 64, 16, SPLIT_K=2)),
    ("x", conv(64, 64, (4, EDGE // 256 + 3), n=1, groups=16, residual=True), Tile("grouped", 64, 16, 16)),
    ("y", conv(32, 64, (4, EDGE // 256 + 3), n=1, groups=32, residual=True), Tile("depthwise", 32, 32)),
    ("y", conv(64, 128, (1, EDGE // 128 + 3), 1, n=1, residual=True), Tile("gemm1x1", 64, 64, 64)),
    ("x", conv(64, 64, (4, EDGE // 256 + 4), n=1, residual=True), Tile("box", 64, 64, 64, SWAP=True)),
    ("sums", conv(32, 128, (2, EDGE // 512 + 3), n=1), Tile("box", 64, 64, 32, SPLIT_K=2)),
]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def last_programs(device, monkeypatch):
    """Lets the interpreter run the last eight programs of each launch."""
    if device == "cuda":
        return
    from triton.runtime.interpreter import interpreter_builder

    def run(kernel, programs, arguments, device, options):
        with monkeypatch.context() as patch:
            for program in range(max(0, programs - 8), programs):
                patch.setattr(interpreter_builder, "set_grid_dim",
                              lambda *_: setattr(interpreter_builder, "grid_dim", (programs, 1, 1)))
                patch.setattr(interpreter_builder, "set_grid_idx",
                              lambda *_, p=program: setattr(interpreter_builder, "grid_idx", (p, 0, 0)))
                launch(kernel, 1, arguments, device, options)

    for family in (conv_bn_act, stem):
        monkeypatch.setattr(family, "launch", run)
    monkeypatch.setattr(tma, "multiprocessors", lambda device: EDGE)  # a program for each tile


def empty(shape, dtype, device):
    try:
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        pytest.skip(f"no address space for {shape}: {error}")


@pytest.mark.parametrize(("tensor", "problem", "tile"), WIDE,
                         ids=[f"{tensor}-{tile}" for tensor, _, tile in WIDE])
def test_the_last_tile_of_a_large_tensor(tensor, problem, tile, device):
    problem = problem._replace(device=device, dtype="fp16")
    p, crop = problem, problem._replace(W=64)
    sizes = {"x": p.N * p.C * p.H * p.W, "y": p.N * p.K * p.P * p.Q, "sums": tile.SPLIT_K * p.N * p.K * p.P * p.Q}
    assert sizes[tensor] > EDGE and legal.legal(tile, problem, 90) is None
    if tile.kernel not in legal.TMA:
        assert conv_bn_act.constants(problem, tile)["WIDE"]
    small = inputs.make(crop)  # what stands at the right edge
    x = empty((p.N, p.C, p.H, p.W), torch.float16, device)
    x[..., -64:] = small.x
    residual = None
    if p.residual:
        residual = empty(p.output_shape, torch.float16, device)
        residual[..., -64:] = small.residual
    result = conv_bn_act.forward(problem, small._replace(x=x, residual=residual), tile)
    # Stock's output with the last pixels replaced is as near to the fp64 answer as these are.
    edge = inputs.stock(crop, small).contiguous(memory_format=torch.channels_last)
    edge[:, :, -1:, -LAST:] = result[:, :, -1:, -LAST:]
    agree(crop, small, edge)


def test_a_stem_with_more_packed_pixels_and_outputs_than_32_bits_count(device):
    problem = StemProblem(*conv(3, 64, (4, 8), 7, n=EDGE // 128 + 3, stride=2))._replace(device=device, dtype="fp16")
    few = problem._replace(N=8)
    small = inputs.make(few)
    x = empty((problem.N, 3, 4, 8), torch.float16, device)
    x[-8:] = small.x
    result = stem.forward(problem, small._replace(x=x))
    assert result.numel() > EDGE
    agree(few, small, result[-8:], stem_stock)


def test_an_image_whose_channels_lie_far_apart_is_packed(device):
    problem = StemProblem(*conv(3, 8, (4, 5), n=1))._replace(device=device, dtype="fp16")
    apart = EDGE // 2 + 5
    x = empty((1, 1, 1, 2 * apart + 20), torch.float16, device).view(-1).as_strided((1, 3, 4, 5), (1, apart, 5, 1))
    x.normal_()
    kernel, programs, arguments = stem.bind_pack(problem, ConvOperands(x, None))
    stem.launch(kernel, programs, arguments, x.device, stem.PACK_OPTIONS)
    assert torch.equal(arguments["y"][..., :3], x.permute(0, 2, 3, 1))
