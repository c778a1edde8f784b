"""The error metric and the tolerance table: the only place where "equal" is defined.

Everything is judged against a run of the stock modules in fp64 on the same, already rounded,
inputs. Stock's own error in the working precision is the yardstick: a fused result may be at most
a small factor worse, plus what a different summation order can cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

EPS = {"fp64": 2.0**-52, "fp32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7, "fp16": 2.0**-10}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16}
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


def check_network(result: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor, *, dtype: str) -> Bound:
    """Judges a whole network's outputs: `check` with room for what a deep net makes of each layer's rounding.

    A network amplifies the rounding of its first layers, of the fused and of the stock run alike but
    not equally, so each may come out ahead: a factor of 2 in rms and 3 in max around stock's own
    error, and an absolute term for nets so shallow or so lucky that stock's error is next to none.
    """
    error, own = measure(result, reference), measure(stock, reference)
    floor = 32 * EPS[dtype] if dtype in ("fp32", "fp64") else EPS[dtype]
    return Bound(error, own, 3 * own.max + floor * own.ref_max, 2 * own.rms + floor * own.ref_rms)
