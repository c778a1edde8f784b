"""Compiling ahead asks for the kernels that the launch itself will ask for, and the probes do what they time."""

import pytest
import torch

from benchmarks import warm
from benchmarks.layers import network
from fused_resnet.kernels.triton import conv_bn_act, conv_bn_act_tma, probes, stem, tiles
from fused_resnet.testing import cases


def on_gpu(problem, n):
    return problem._replace(device="cuda", dtype="bf16", N=n)


@pytest.fixture
def asked(monkeypatch):
    seen = []
    monkeypatch.setattr(warm, "_compile", lambda kernel, programs, arguments, device, options:
                        seen.append((kernel, programs, arguments)))
    return seen


def test_both_launches_of_a_split_reduction(asked):
    problem = on_gpu(cases.conv(512, 512, 7), 1)
    assert tiles.pick(problem, 90).SPLIT_K > 1
    warm.compile_one(problem, None, 90)
    assert [kernel for kernel, _, _ in asked] == [conv_bn_act.conv_gemm, conv_bn_act.finish_split]


def test_both_launches_of_the_stem(asked):
    warm.compile_one(on_gpu(network("resnet50")[0][0], 256), None, 90)
    assert [kernel for kernel, _, _ in asked] == [stem.pack_pixels, stem.conv_pool]


def test_the_box_is_that_of_the_real_batch(asked):
    problem = on_gpu(cases.conv(512, 512, 7), 256)
    tile = next(t for t in tiles.candidates(problem, 90) if t.kernel == "box" and t.SPLIT_K == 1)
    warm.compile_one(problem, tile, 90)
    (kernel, _, arguments), = asked
    assert kernel is conv_bn_act_tma.conv_box and arguments["NB"] > 1
    assert arguments["NB"] * arguments["TH"] * arguments["TW"] == tile.BLOCK_M


@pytest.mark.parametrize("kind", ["gemm1x1", "ws", "grouped", "depthwise"])
def test_every_kind_of_tile(asked, kind):
    problems = {"gemm1x1": cases.conv(64, 256, 56, 1, residual=True), "ws": cases.conv(128, 128, 28),
                "grouped": cases.conv(128, 128, 28, groups=32), "depthwise": cases.conv(64, 64, 28, groups=64)}
    problem = on_gpu(problems[kind], 64)
    tile = next(t for t in tiles.candidates(problem, 90) if t.kernel == kind)
    warm.compile_one(problem, tile, 90)
    assert asked


def test_operands_have_the_layout_of_the_real_ones():
    from fused_resnet.testing import inputs

    problem = cases.conv(16, 24, 5, bias=True, residual=True, prologue="relu")
    for dtype in ("bf16", "fp32"):
        real, ahead = inputs.make(problem._replace(dtype=dtype)), warm.operands(problem._replace(dtype=dtype))
        for name, tensor in real._asdict().items():
            if isinstance(tensor, torch.Tensor):
                other = getattr(ahead, name)
                assert (other.shape, other.dtype, other.stride()) == (tensor.shape, tensor.dtype, tensor.stride()), name


def test_the_read_probe_reads_everything_in_every_pass():
    x = torch.randint(-9, 10, (40 * probes.READ_BLOCK,), dtype=torch.int32)
    assert int(probes.read(x, 3).sum()) == 3 * int(x.sum())


def test_the_launch_probe_counts():
    x = torch.zeros(1, dtype=torch.int32)
    for _ in range(3):
        probes.count(x)
    assert int(x) == 3
