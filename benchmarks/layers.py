"""What every stage on a GPU shares: a layer's key, its operands, stock's answer and its floor."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from fused_resnet import backends
from fused_resnet.bench.layers import Ceilings
from fused_resnet.ops import stem
from fused_resnet.ops.stem import StemProblem
from fused_resnet.problem import ELEMENT_BYTES, ConvOperands, ConvProblem
from fused_resnet.testing import cases, inputs

Rows = Iterator[dict[str, Any]]
DTYPES = ("bf16", "fp16", "tf32", "fp32")
KERNELS = ("triton", "cuda", "cudnn")
IMAGES = 4  # different pictures in a batch; the others repeat them, for drawing numbers takes longer than all timings


def family(problem: ConvProblem) -> str:
    """The kernel family of a problem."""
    return stem.FAMILY if isinstance(problem, StemProblem) else "conv_bn_act"


def kernel(backend: str, problem: ConvProblem | None = None) -> Any:
    """The module that computes `problem` on `backend`; conv_bn_act's without a problem."""
    name = family(problem) if problem is not None else "conv_bn_act"
    return importlib.import_module(f"fused_resnet.kernels.{backend}.{name}")


def provides(backend: str, name: str) -> bool:
    """Whether `backend` has kernels of the family `name` at all."""
    return importlib.util.find_spec(f"fused_resnet.kernels.{backend}.{name}") is not None


def offered(backend: str, problem: ConvProblem) -> bool:
    """Whether `backend` has kernels of the problem's family at all."""
    return provides(backend, family(problem))


@contextlib.contextmanager
def searched() -> Iterator[None]:
    """Inside, cuDNN measures its algorithms at each new shape: stock and cuDNN at their best."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def key(problem: ConvProblem, model: str, provider: str | None = None, **more: Any) -> dict[str, Any]:
    """The fields that name a layer's row."""
    named = {"provider": provider} if provider else {}
    return {"level": "layer", "model": model, "problem": problem.id, "batch": problem.N, "dtype": problem.dtype,
            "autocast": False, "device": problem.device, "mode": "inference", "graph": False, **named, **more}


def network(name: str) -> list[tuple[ConvProblem, int]]:
    """The distinct launches of a network with how often each occurs; its first is the family `stem`."""
    (first, count), *rest = cases.LAYERS[name]
    return [(StemProblem(*first), count), *rest]


def stock(problem: ConvProblem, operands: ConvOperands, exact: bool = False) -> torch.Tensor:
    """What stock operators return, in the operands' precision or in fp64."""
    if exact:
        problem, operands = problem._replace(dtype="fp64"), backends.widen(operands)
    with torch.no_grad():
        return backends.reference(family(problem))(problem, operands)


def operands(problem: ConvProblem, seed: int = 0) -> ConvOperands:
    """Random operands of any batch, at the price of drawing `IMAGES` pictures."""
    made = inputs.make(problem._replace(N=min(problem.N, IMAGES)), seed)

    def repeat(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or problem.N <= IMAGES:
            return tensor
        times = -(-problem.N // IMAGES)
        return tensor.repeat(times, 1, 1, 1)[:problem.N].contiguous(memory_format=torch.channels_last)

    return made._replace(x=repeat(made.x), residual=repeat(made.residual))


def moved(problem: ConvProblem) -> int:
    """Fewest bytes through memory: a 1x1 window with a stride reads only the pixels under it."""
    p = problem
    skipped = p.N * p.C * (p.H * p.W - p.P * p.Q) if p.R * p.S == 1 and p.padding == (0, 0) else 0
    return p.bytes - ELEMENT_BYTES[p.dtype] * skipped


@functools.cache
def ceilings(dtype: str) -> Ceilings:
    """What this GPU reaches in `dtype`, measured once a process."""
    return Ceilings.measure(dtype, "cuda")


def rated(problem: ConvProblem, row: dict[str, Any]) -> dict[str, Any]:
    """`row` with the floor of one launch, and the share of it that the row's time is."""
    if row.get("ms_p50") is None:
        return row
    floor, _ = ceilings(problem.dtype).floor(problem.flops, moved(problem))
    return {**row, "floor_ms": floor, "roofline_share": floor / row["ms_p50"],
            "images_per_s": problem.N / row["ms_p50"] * 1e3}
