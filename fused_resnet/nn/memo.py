"""What a launch found out at its last call, so that the next call of the same kind need not find it out again.

Half of the host's time at batch 1 went into asking every operand for its shape, dtype and device, and into building
the problem from the answers. PyTorch can compare all of that with what it was in one call.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch

from fused_resnet.problem import ConvOperands, ConvProblem


class PlainGuards:
    """What TensorGuards does, in Python and in four times the time: that class is no public one and may go."""

    def __init__(self, *tensors: torch.Tensor, **_: Any) -> None:
        self._then = list(map(_looks, tensors))

    def check(self, *tensors: torch.Tensor) -> bool:
        return list(map(_looks, tensors)) == self._then


def _looks(t: torch.Tensor) -> tuple:
    return (type(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad, t.is_inference(),
            torch.is_inference_mode_enabled())


try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = PlainGuards  # type: ignore[misc,assignment]


class _Known(NamedTuple):
    situation: tuple
    present: itemgetter  # the tensors among the operands
    others: itemgetter  # what is absent, and the numbers
    values: tuple  # of `others`
    guards: TensorGuards
    problem: ConvProblem


class Memo:
    """The problem of one launch, as long as nothing that it was made from is different.

    It keeps no tensor, only what tensors were like: type, dtype, device, shape, strides, and the dispatch keys, which
    tell inference mode and autocast. Their data are none of its business: kernels read them live. Replaced in one
    assignment, so threads may share one; copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.known: _Known | None = None

    def __reduce__(self) -> tuple:
        return Memo, ()

    @property
    def problem(self) -> ConvProblem | None:
        """Of the last call that was kept; None before it."""
        return None if self.known is None else self.known.problem

    def recall(self, situation: tuple, operands: ConvOperands) -> ConvProblem | None:
        """The problem of an earlier call, if this one is like it."""
        known = self.known
        if (known is None or known.situation != situation or known.others(operands) != known.values
                or not known.guards.check(*known.present(operands))):
            return None
        return known.problem

    def keep(self, situation: tuple, operands: ConvOperands, problem: ConvProblem) -> None:
        """Remembers a call that was found to fit.

        Args:
            situation: all that the problem depends on besides the operands, by value.
            operands: what the launch reads.
            problem: what was made of both.
        """
        numbers = len(operands) - 3  # eps, pre_eps, reuse
        present = [i for i in range(numbers) if operands[i] is not None]
        others = itemgetter(*(i for i in range(len(operands)) if i not in present))
        tensors = [operands[i] for i in present]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self.known = _Known(situation, itemgetter(*present), others, others(operands), guards, problem)
