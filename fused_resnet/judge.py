"""Compares what a kernel returned with the reference: in the same precision and, on the same rounded inputs, in fp64.

The self-check of a kernel's first launch and the tuner judge alike; what is allowed stands in `numerics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fused_resnet import numerics
from fused_resnet.problem import ConvOperands, Int8Operands

Reference = Callable[[Any, Any], Any]
SLACK = 4.0  # a self-check looks for broken kernels: it may meet unlucky data, a bug is off by orders of magnitude


class Judge:
    """The answers of the reference to one problem, and the verdict over others.

    Args:
        reference: of the family.
        problem: what is computed.
        operands: its tensors; they are read once in fp64.
        depth: terms of the longest sum behind one result, by default the problem's.
    """

    def __init__(self, reference: Reference, problem: Any, operands: Any, depth: int | None = None) -> None:
        self.problem, self.depth = problem, depth or problem.depth
        self.stock = floating(reference(problem, operands))
        self.exact = floating(reference(problem._replace(dtype="fp64"), widen(operands)))

    @property
    def finite(self) -> bool:
        """Whether the right answer holds neither NaN nor Inf: else it says little about a kernel."""
        return all(bool(torch.isfinite(t.sum())) for t in self.exact)

    def __call__(self, result: Any, folded: bool = False) -> list[numerics.Bound]:
        """The error of every result and what it may be; `folded` as in `numerics.check`.

        Sums over 16-bit data are kept in fp32: few of them, whose errors in two orders are alike only in size.
        """
        own = numerics.DTYPES[self.problem.dtype]
        return [numerics.check(*one, dtype=self.problem.dtype, depth=self.depth, folded=folded or one[0].dtype != own)
                for one in zip(floating(result), self.stock, self.exact, strict=True)]


def floating(result: Any) -> tuple[torch.Tensor, ...]:
    """The results of a launch that have a rounding error: families of training return several, masks among them."""
    every = result if isinstance(result, tuple | list) else (result,)
    return tuple(t for t in every if isinstance(t, torch.Tensor) and t.is_floating_point())


def widen(operands: Any) -> Any:
    """The operands in fp64, but for masks."""
    return type(operands)(*[v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                            for v in operands])


def ends(problem: Any, operands: Any, result: Any) -> tuple[Any, Any, Any]:
    """The same for the first and last image, where images do not depend on each other; else as it is."""
    if not isinstance(operands, ConvOperands | Int8Operands) or not isinstance(result, torch.Tensor):
        return problem, operands, result
    at = [0, problem.N - 1] if problem.N > 1 else [0]
    images = {name: getattr(operands, name) for name in ("x", "residual")}
    few = operands._replace(**{name: t[at] for name, t in images.items() if t is not None})
    if isinstance(operands, Int8Operands):
        return problem._replace(conv=problem.conv._replace(N=len(at))), few, result[at]
    return problem._replace(N=len(at)), few, result[at]


def verdict(reference: Reference, problem: Any, operands: Any, result: Any, folded: bool) -> str | None:
    """What a self-check says of a result: "ok", what is wrong with it, or None where nothing can be said now.

    Of a convolution's result the first and last image are looked at.
    """
    try:
        few_problem, few, few_result = ends(problem, operands, result)
        if isinstance(operands, Int8Operands):
            finite, bounds = True, [numerics.check_quantised(few_result, reference(few_problem, few))]
        else:
            judged = Judge(reference, few_problem, few)
            bounds, finite = judged(few_result, folded), judged.finite
    except torch.OutOfMemoryError:
        return None
    if not finite:
        return None
    fine = all(b.error.max <= SLACK * b.max_allowed and b.error.rms <= SLACK * b.rms_allowed
               and b.error.nonfinite_match for b in bounds)
    return "ok" if fine else f"failed its self-check on this machine: {'; '.join(map(str, bounds))}"
