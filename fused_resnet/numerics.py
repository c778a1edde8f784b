"""The error metric and the tolerance table: the only place where "equal" is defined.

Everything is judged against a run of the stock modules in fp64 on the same, already rounded,
inputs. Stock's own error in the working precision is the yardstick: a fused result may be at most
a small factor worse, plus what a different summation order can cost.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

EPS = {"fp64": 2.0**-52, "fp32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7, "fp16": 2.0**-10}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16, "int8": torch.float32}  # of what goes in and comes out
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Error:
    """Largest and root-mean-square difference, with the size of the reference beside them."""

    max: float
    rms: float
    ref_max: float
    ref_rms: float
    nonfinite_match: bool  # NaN and Inf stand in the same places (finite where the reference is, too)

    @property
    def rel(self) -> float:
        """rms(error) / rms(reference): the figure that tables quote."""
        return self.rms / self.ref_rms if self.ref_rms else self.rms


def measure(result: torch.Tensor, reference: torch.Tensor) -> Error:
    """Compares `result` with `reference` (fp64, any equal shape).

    A result that is finite where the working precision of the reference overflowed is no error;
    a result that is not finite where the reference is finite is one.
    """
    if result.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(result.shape)} and {tuple(reference.shape)}")
    a, b = result.detach().to(torch.float64), reference.detach().to(torch.float64)
    both = torch.isfinite(a) & torch.isfinite(b)
    match = bool((torch.isfinite(a) | ~torch.isfinite(b)).all()) and bool((torch.isnan(b) <= torch.isnan(a)).all())
    a, b = a[both], b[both]
    if not a.numel():
        return Error(0.0, 0.0, 0.0, 0.0, match)
    d = a - b
    return Error(d.abs().max().item(), d.square().mean().sqrt().item(), b.abs().max().item(),
                 b.square().mean().sqrt().item(), match)


def flash_atol(reference: torch.Tensor, dtype: torch.dtype) -> float:
    """FlashAttention's absolute slack: twice what adding and taking away 0.3 costs in `dtype`.

    Source: Dao-AILab/flash-attention, tests of the forward pass.
    """
    r = reference.detach().to(dtype)
    r = r[torch.isfinite(r)]
    return 2 * float((r + 0.3 - 0.3 - r).abs().max()) if r.numel() else 0.0


@dataclass(frozen=True)
class Bound:
    """What `check` compares: the error that is allowed and the error that was found."""

    error: Error
    stock: Error
    max_allowed: float
    rms_allowed: float

    @property
    def ok(self) -> bool:
        return (self.error.nonfinite_match and self.error.max <= self.max_allowed
                and self.error.rms <= self.rms_allowed)

    def __str__(self) -> str:
        where = "" if self.error.nonfinite_match else "; NaN or Inf in other places than the reference"
        return (f"max {self.error.max:.3g} (allowed {self.max_allowed:.3g}, stock {self.stock.max:.3g}), "
                f"rms {self.error.rms:.3g} (allowed {self.rms_allowed:.3g}, stock {self.stock.rms:.3g}){where}")


def check(result: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor, *, dtype: str, depth: int,
          folded: bool = False) -> Bound:
    """Judges one fused result: the tolerance table.

    Args:
        result: what the fused kernel returned.
        stock: what the stock modules return in the same precision.
        reference: what the stock modules return in fp64 for the same rounded inputs.
        dtype: a key of `EPS`. fp32 allows for another summation order, 16-bit for one rounding.
        depth: length of one dot product (C / groups * R * S).
        folded: the kernel folds the norm into 16-bit weights, which rounds them once more.
    """
    error, own = measure(result, reference), measure(stock, reference)
    if dtype in ("fp32", "fp64", "tf32"):
        order = depth**0.5 * EPS["fp64" if dtype == "fp64" else "fp32"]
        if dtype == "tf32":
            return Bound(error, own, 2 * own.max + order * own.ref_max, 2 * own.rms + order * own.ref_rms)
        return Bound(error, own, 2 * own.max + 0.5 * order * own.ref_max, 1.1 * own.rms + 0.4 * order * own.ref_rms)
    slack = 0.3 * EPS[dtype] * own.ref_rms if folded else 0.0
    return Bound(error, own, 2 * own.max + flash_atol(reference, DTYPES[dtype]), 1.1 * own.rms + slack)


WINOGRAD = 1e-5  # max|error| / max|reference| of one fp32 convolution by Winograd's algorithm, besides `check`
INT8_NETWORK = 0.25  # of the size of the output: the error of a whole network of 8-bit values


def agreement(result: torch.Tensor, reference: torch.Tensor) -> float:
    """The share of rows of logits [N, classes] whose largest is the same."""
    return (result.argmax(1) == reference.argmax(1)).double().mean().item()


def check_network(result: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor, *, dtype: str) -> Bound:
    """Judges a whole network's outputs: `check` with room for what a deep net makes of each layer's rounding.

    A network amplifies the rounding of its first layers, of the fused and of the stock run alike but
    not equally, so each may come out ahead: a factor of 2 in rms and 3 in max around stock's own
    error, and an absolute term for nets so shallow or so lucky that stock's error is next to none.

    int8 is no precision but an approximation, whose error the calibration decides: what is told here from a right
    network is a wrong one.
    """
    error, own = measure(result, reference), measure(stock, reference)
    if dtype == "int8":
        return Bound(error, own, INT8_NETWORK * own.ref_max, INT8_NETWORK * own.ref_rms)
    floor = 32 * EPS[dtype] if dtype in ("fp32", "fp64") else EPS[dtype]
    return Bound(error, own, 3 * own.max + floor * own.ref_max, 2 * own.rms + floor * own.ref_rms)


_QUANTISED = 32 * EPS["fp32"]  # a few roundings in fp32 behind exact sums


def check_quantised(result: torch.Tensor, reference: torch.Tensor) -> Bound:
    """Judges a launch on quantised values, whose sums are exact: in uint8 one step where fp32 rounds to either side.

    Args:
        result: uint8 or fp32.
        reference: of the family, for the same quantised inputs; in the dtype of `result`.
    """
    error, none = measure(result, reference), Error(0.0, 0.0, 1.0, 1.0, True)
    if result.dtype == torch.uint8:
        return Bound(error, none, 1.0, 0.1)  # one value in a hundred may be the next one
    return Bound(error, none, _QUANTISED * error.ref_max, _QUANTISED * error.ref_rms)


# How many times stock's error a gradient may be off. fp32 differs by summation order alone, and a channels_last network
# of stock's own was seen at 3.5 times; in 16 bits rounding decides, which all orders share.
_GRADIENTS = {"fp64": 6.0, "fp32": 6.0, "tf32": 3.0, "bf16": 2.0, "fp16": 2.0}
_NOTHING = 10.0  # times a gradient's own size: where stock is off by that much the true gradient is zero


def check_gradients(results: Sequence[torch.Tensor], stock: Sequence[torch.Tensor], reference: Sequence[torch.Tensor],
                    *, dtype: str) -> Bound:
    """Judges the gradients of a whole network, each by its relative error, so that small tensors count like large ones.

    Args:
        results, stock, reference: one tensor for each parameter, in the same order; the loss may be among them.
        dtype: a key of `EPS`, in which the network computed.

    Returns:
        error.rms and stock.rms are root mean squares of relative errors over the tensors; error.max is the largest
        error in units of what stock has there, or has in the median where that is more.
    """
    pairs = [(measure(a, c), measure(b, c)) for a, b, c in zip(results, stock, reference, strict=True)]
    known = [(error, own) for error, own in pairs if own.rel <= _NOTHING]
    match = all(error.nonfinite_match for error, _ in pairs)
    if not known:
        return Bound(Error(0.0, 0.0, 1.0, 1.0, match), Error(1.0, 0.0, 1.0, 1.0, True), _GRADIENTS[dtype], 0.0)
    floor = max(statistics.median(own.rel for _, own in known), EPS[dtype])
    worst = max(error.rel / max(own.rel, floor) for error, own in known)
    rms, own_rms = ((sum(e.rel**2 for e in column) / len(known))**0.5 for column in zip(*known, strict=True))
    return Bound(Error(worst, rms, 1.0, 1.0, match), Error(1.0, own_rms, 1.0, 1.0, True), _GRADIENTS[dtype],
                 0.6 * _GRADIENTS[dtype] * max(own_rms, floor))
