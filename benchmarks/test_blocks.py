"""The residual blocks of every stage of ResNet-18 and ResNet-50 at batch 8: plain torch beside the fused block."""

import pytest
import torch
from torch import nn

from benchmarks.test_layers import DEVICE, synchronised
from fused_resnet import fusing, numerics
from fused_resnet.bench import stock
from fused_resnet.nn import BasicBlock, Bottleneck

STAGES = [(kind, planes, edge, first) for kind in (BasicBlock, Bottleneck)
          for planes, edge in ((64, 56), (128, 28), (256, 14), (512, 7)) for first in (True, False)]


def name(stage):
    kind, planes, edge, first = stage
    return f"{kind.__name__}-{planes}-{edge}x{edge}{'-projection' if first else ''}"


def make(kind, planes, edge, first):
    """The block as plain torch in channels_last, and the edge of its input; the first of a stage projects."""
    out = planes * kind.expansion
    stride = 2 if first and planes > 64 else 1
    channels = out if not first else 64 if planes == 64 else out // 2
    projection = None
    if stride != 1 or channels != out:
        projection = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    block = stock.plain(kind(channels, planes, stride, projection)).eval()
    return stock.in_memory_format(block.to(DEVICE), torch.channels_last), channels, edge * stride


@pytest.mark.benchmark(max_time=0.2, min_rounds=5, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("provider", ["eager_channels_last", "fused"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES, ids=name)
def test_block(benchmark, stage, dtype, provider):
    torch.manual_seed(0)
    block, channels, edge = make(*stage)
    block = block.to(numerics.DTYPES[dtype])
    x = torch.randn(8, channels, edge, edge, device=DEVICE, dtype=numerics.DTYPES[dtype])
    x = x.contiguous(memory_format=torch.channels_last)
    fused = fusing.fuse(block, memory_format=torch.channels_last)
    with torch.no_grad():
        verdict = fusing.verify(block, fused, x)
        assert verdict, verdict
        run = fused if provider == "fused" else block
        benchmark.group = f"{name(stage)}-{dtype}"
        benchmark.extra_info.update(level="block", model=name(stage), dtype=dtype, batch=8, device=DEVICE,
                                    provider=provider)
        benchmark(synchronised(lambda: run(x)))
