"""The steps of a quantised plan: launches on uint8, pools between them, and the plan that runs them.

Values that only such steps read are uint8 in channels_last memory; whatever else reads a value finds fp32. Every
launch keeps its float twin, which runs where the operands no longer fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fused_resnet import backends, int8, native, tape
from fused_resnet.fusing import replay
from fused_resnet.fusing.plan import Plan, difference
from fused_resnet.fusing.steps import Call, Launch
from fused_resnet.nn import executor
from fused_resnet.ops import conv_bn_act, conv_int8
from fused_resnet.problem import ConvProblem, Int8Operands, Int8Problem

PLAN_TOLERANCE = 0.5  # rounding to 8 bits stays far below, a dropped operation lands near 1


class Int8Launch(Launch):
    """A launch whose convolution is one of 8-bit values."""

    def __init__(self, launch: Launch, x: int8.Affine, residual: int8.Affine | None, y: int8.Affine | None):
        """Takes the place of `launch`.

        Args:
            launch: the float launch.
            x: scale and zero point of its input, which may be fp32: then it is quantised here.
            residual: those of its residual, if that is uint8.
            y: those of its result, if that is uint8.
        """
        self.__dict__.update(launch.__dict__)
        self.of_x, self.of_residual, self.of_y = x, residual, y
        self.float, self.solved = launch, None  # type: tuple[Launch, Int8Problem | None]
        self.pooled = False

    @property
    def steady(self) -> bool:
        return self.solved is not None or self.float.steady

    def run(self, values: list, tidy: bool, finite: bool) -> Any:
        x, residual = values[self.x], None if self.residual is None else values[self.residual]
        operands, problem = self._operands(x, residual)
        self.solved = problem
        if problem is None or operands is None:
            return self._in_float(values, tidy, finite)
        out = conv_int8.execute(problem, operands)
        self.backend = backends.last()
        if not self.pool:
            return out
        return max_pool(out, (3, 3), (2, 2), (1, 1)) if self.of_y else torch.max_pool2d(out, 3, 2, 1)

    def _operands(self, x: Any, residual: Any) -> tuple[Int8Operands | None, Int8Problem | None]:
        """What the launch reads and solves, or Nones where the modules are no longer what they were."""
        conv: Any = self.conv
        weight, bias = conv._parameters["weight"], conv._parameters["bias"]
        gamma, beta, mean, var, eps = executor.live(self.norm)
        vectors = [v for v in (bias, gamma, beta, mean, var) if v is not None]
        if (weight is None or not weight.is_cpu or weight.dtype is not torch.float32 or weight.dim() != 4
                or conv.groups != 1 or x.dim() != 4 or x.shape[1] != weight.shape[1] or not x.is_cpu
                or any(v.dtype is not torch.float32 or v.shape != weight.shape[:1] or not v.is_cpu for v in vectors)):
            return None, None
        shape = conv_bn_act.output_shape(x, weight, conv.stride, conv.padding, conv.dilation)
        if shape is None or residual is not None and residual.shape != shape:
            return None, None
        if x.dtype is not torch.uint8:
            x = quantize(x, self.of_x)
        r = self.of_residual or int8.Affine(1.0, 0)
        y = self.of_y or int8.Affine(1.0, 0)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        (n, c, h, w), (k, _, r_, s) = x.shape, weight.shape
        p = ConvProblem("cpu", "int8", n, h, w, c, k, r_, s, conv.stride, conv.padding, conv.dilation, 1,
                        bias is not None, mean is not None, residual is not None, self.activation)
        kind = "" if residual is None else "uint8" if self.of_residual else "fp32"
        problem = Int8Problem(p, kind, "uint8" if self.of_y else "fp32")
        return Int8Operands(x, weight, bias, gamma, beta, mean, var, residual, eps, *self.of_x, *r, *y), problem

    def _in_float(self, values: list, tidy: bool, finite: bool) -> Any:
        """The float launch, between values in fp32."""
        wide = list(values)
        for slot, of in ((self.x, self.of_x), (self.residual, self.of_residual)):
            if slot is not None and values[slot].dtype is torch.uint8:
                wide[slot] = int8.dequantize(values[slot], of)  # type: ignore[arg-type]
        out = self.float.run(wide, tidy, finite)
        self.backend = self.float.backend
        return out if self.of_y is None else quantize(out, self.of_y)


class Int8Pool:
    """A max-pool on uint8."""

    steady, opaque, taped, heeded = True, False, True, True

    def __init__(self, call: Call):
        self.call, self.target, self.out, self.frees = call, call.target, call.out, call.frees
        self.x = call.args[0].at

    def tensors(self) -> tuple:
        """What it reads besides values."""
        return ()

    def numbers(self) -> tuple:
        """What else it does depends on."""
        return replay.POOL(self.target.__dict__)

    def run(self, values: list, tidy: bool, finite: bool = True) -> Any:
        pool = self.target
        return max_pool(values[self.x], pair(pool.kernel_size), pair(pool.stride), pair(pool.padding))


def quantize(x: torch.Tensor, to: int8.Affine) -> torch.Tensor:
    """`int8.quantize`, by the native library where it is there: in an eighth of the time."""
    if native.missing("cpu") is not None or x.dim() != 4:
        return int8.quantize(x, to)
    return tape.quantize(x.contiguous(memory_format=torch.channels_last), 1.0 / to.scale, to.zero)


def max_pool(x: torch.Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
             ) -> torch.Tensor:
    """`conv_int8.max_pool`, by the native library where it is there."""
    if native.missing("cpu") is not None:
        return conv_int8.max_pool(x, kernel, stride, padding)
    return tape.max_pool(x, kernel, stride, padding)


def pair(value: Any) -> tuple[int, int]:
    """What torch.nn makes of a size."""
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


class Int8Plan(Plan):
    """A plan with a second list of steps, for fp32 on the CPU; other calls run the float ones."""

    def __init__(self, plan: Plan, steps: list, reasons: dict[str, str]):
        """Takes the place of `plan`.

        Args:
            plan: the float plan.
            steps: its steps, some of them quantised.
            reasons: name of a convolution -> why it stays in float.
        """
        self.__dict__.update(plan.__dict__)
        self.in_int8, self.reasons = steps, reasons
        self.launches = [step for step in steps if isinstance(step, Launch)]

    def chosen(self, args: tuple) -> list:
        """The steps for a call: autocast and other dtypes and devices are not what was calibrated."""
        fits = all(x.is_cpu and x.dtype is torch.float32 for x in args) and not torch.is_autocast_enabled("cpu")
        return self.in_int8 if fits else self.steps

    def _run(self, args: tuple, convert: bool, answers: dict[int, list] | None = None, steps: list | None = None
             ) -> Any:
        """8 bits have no NaN: where weights hold one the whole call runs in float."""
        given = answers and {key: list(value) for key, value in answers.items()}
        try:
            return super()._run(args, convert, given, steps)
        except conv_int8.NotFinite:
            return super()._run(args, convert, answers, self.steps)

    def differs(self, result: Any, expected: Any, args: tuple) -> str | None:
        return difference(result, expected, args, PLAN_TOLERANCE if self.chosen(args) is self.in_int8 else None)


def quantised_conv(launch: Launch) -> str | None:
    """Why this launch stays in float, or None."""
    conv: Any = launch.conv
    if launch.prologue is not None:
        return "a norm in front of the convolution"
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if launch.activation not in conv_int8.LIMITS:
        return f"{launch.activation} does not only clamp"
    if conv.weight.dtype is not torch.float32:
        return f"weights in {str(conv.weight.dtype).removeprefix('torch.')}"
    if not bool(torch.isfinite(conv.weight).all()):
        return "weights that are not finite"
    return None


def poolable(step: Any) -> bool:
    """Whether a step is a max-pool that can run on uint8."""
    if type(step) is not Call or step.kind != "call_module" or type(step.target) is not nn.MaxPool2d:
        return False
    pool = step.target
    return (pair(pool.dilation) == (1, 1) and not pool.ceil_mode and not pool.return_indices
            and len(step.args) == 1 and not step.kwargs)


def quantised(model: nn.Module) -> bool:
    """Whether `quantize` made some convolution of `model` one of 8-bit values."""
    return any(isinstance(step, Int8Launch) for module in model.modules()
               if isinstance(plan := module.__dict__.get("forward"), Int8Plan) for step in plan.in_int8)
