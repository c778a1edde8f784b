"""How every kernel test runs a kernel and judges what it returns."""

import torch

from fused_resnet import numerics
from fused_resnet.testing import inputs
from fused_resnet.testing.memory import guarded


def guarded_run(forward, problem, operands):
    """Runs `forward` with every tensor between guard bands and the output full of NaN; returns the output."""
    with guarded() as guards:
        fenced = {name: guards.copy(value) for name, value in operands._asdict().items()
                  if isinstance(value, torch.Tensor)}
        result = forward(problem, operands._replace(**fenced))
        touched = guards.touched()
    assert touched == 0, f"{problem.id}: {touched} elements outside of the tensors were written"
    return result


def agree(problem, operands, result, stock=inputs.stock):
    """Asserts type, shape and layout, and that `result` is as near to the fp64 answer as the tolerance table asks."""
    assert result.dtype == operands.x.dtype
    assert result.shape == problem.output_shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    exact = stock(problem, operands, torch.float64)
    bound = numerics.check(result, stock(problem, operands), exact, dtype=problem.dtype, depth=problem.depth)
    assert bound.ok, f"{problem.id}: {bound}"
