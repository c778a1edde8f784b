"""The frozen description of one fused launch.

`ConvProblem` is five things at once: the dispatch key, the tuning key, the test id, the benchmark
row key and the cost model. It holds sizes and flags, never tensors. It is a NamedTuple because one
is built and hashed for every convolution of every eager forward: 0.3 us, a frozen dataclass of the
same fields costs 1.6 us.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish")
ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1, "uint8": 1}


class ConvProblem(NamedTuple):
    """One convolution + batch norm + residual add + activation, in cuDNN's letters.

    Sizes are in elements, per dimension of the logical NCHW input and KCRS weight. `prologue` is
    "" without one, else the activation that follows the batch norm in front of the convolution.
    """

    device: str  # "cpu" | "cuda"
    dtype: str  # a key of ELEMENT_BYTES; tf32 is fp32 data multiplied in TF32
    N: int
    H: int
    W: int
    C: int
    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    norm: bool = True
    residual: bool = False
    activation: str = "relu"
    prologue: str = ""

    @property
    def P(self) -> int:
        """Rows of the output."""
        return (self.H + 2 * self.padding[0] - self.dilation[0] * (self.R - 1) - 1) // self.stride[0] + 1

    @property
    def Q(self) -> int:
        """Columns of the output."""
        return (self.W + 2 * self.padding[1] - self.dilation[1] * (self.S - 1) - 1) // self.stride[1] + 1

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.K, self.P, self.Q)

    @property
    def depth(self) -> int:
        """Length of one dot product: C / groups * R * S."""
        return self.C // self.groups * self.R * self.S

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.C

    @property
    def flops(self) -> int:
        """Multiply-adds counted as two, padded taps included, epilogue left out."""
        return 2 * self.N * self.K * self.P * self.Q * self.depth

    @property
    def bytes(self) -> int:
        """Fewest bytes through memory: each input read once, the output written once."""
        element = ELEMENT_BYTES[self.dtype]
        output = self.N * self.K * self.P * self.Q
        moved = self.N * self.C * self.H * self.W + self.K * self.depth + output * (1 + self.residual)
        vectors = 4 * self.K * (4 * self.norm + self.bias) + 16 * self.C * bool(self.prologue)
        return element * moved + vectors

    @property
    def layer(self) -> ConvProblem:
        """The same problem at batch 1: the key under which verdicts and tuned rows are kept."""
        return self._replace(N=1)

    @property
    def id(self) -> str:
        """A name that is unique, readable and safe as a pytest id and as a JSON key."""

        def pair(letter: str, value: tuple[int, int], default: int) -> str:
            if value == (default, default):
                return ""
            return f"{letter}{value[0]}" if value[0] == value[1] else f"{letter}{value[0]}x{value[1]}"

        parts = [f"n{self.N}c{self.C}h{self.H}w{self.W}k{self.K}r{self.R}s{self.S}"]
        parts.append(pair("t", self.stride, 1) + pair("p", self.padding, 0) + pair("d", self.dilation, 1))
        parts.append(f"g{self.groups}" if self.groups > 1 else "")
        parts.append("+".join(
            [name for name in ("bias", "norm", "residual") if getattr(self, name)] + [self.activation]))
        parts.append(f"pre_{self.prologue}" if self.prologue else "")
        parts += [self.dtype, self.device]
        return "-".join(part for part in parts if part)


class ConvOperands(NamedTuple):
    """What one launch reads. Absent parts are None; the layout contract stands in `ops.conv_bn_act`."""

    x: Any  # [N, C, H, W], channels_last
    weight: Any  # [K, C / groups, R, S], any strides
    bias: Any = None  # [K]
    gamma: Any = None  # [K], as are beta, mean and var
    beta: Any = None
    mean: Any = None
    var: Any = None
    residual: Any = None  # [N, K, P, Q], channels_last
    pre_gamma: Any = None  # [C], as are the other pre_ vectors
    pre_beta: Any = None
    pre_mean: Any = None
    pre_var: Any = None
    eps: float = 1e-5
    pre_eps: float = 1e-5
    reuse: bool = False  # the result may be written over the residual, which nobody reads again


class Int8Problem(NamedTuple):
    """A convolution of quantised values with what stands around it: the problem of the family `conv_int8`."""

    conv: ConvProblem  # in int8, without groups and prologue
    residual: str = ""  # dtype of the residual: "", "uint8" or "fp32"
    out: str = "uint8"  # dtype of the result: "uint8" or "fp32"

    @property
    def device(self) -> str:
        return self.conv.device

    @property
    def dtype(self) -> str:
        return self.conv.dtype

    @property
    def N(self) -> int:
        return self.conv.N

    @property
    def C(self) -> int:
        return self.conv.C

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.conv.output_shape

    @property
    def depth(self) -> int:
        return self.conv.depth

    @property
    def flops(self) -> int:
        return self.conv.flops

    @property
    def bytes(self) -> int:
        """Fewest bytes through memory: each input read once, the output written once."""
        p = self.conv
        outputs = ELEMENT_BYTES[self.out] + (ELEMENT_BYTES[self.residual] if self.residual else 0)
        return p.N * p.C * p.H * p.W + p.K * (p.depth + 8) + p.N * p.K * p.P * p.Q * outputs

    @property
    def layer(self) -> Int8Problem:
        return self._replace(conv=self.conv.layer)

    @property
    def id(self) -> str:
        return "-".join([self.conv.id, *([f"add_{self.residual}"] if self.residual else []), f"to_{self.out}"])


class Int8Operands(NamedTuple):
    """What one launch of the family `conv_int8` reads; the contract stands in `ops.conv_int8`."""

    x: Any  # [N, C, H, W], uint8, channels_last
    weight: Any  # [K, C, R, S], fp32 in any strides
    bias: Any = None  # [K], fp32, as are gamma, beta, mean and var
    gamma: Any = None
    beta: Any = None
    mean: Any = None
    var: Any = None
    residual: Any = None  # [N, K, P, Q], uint8 or fp32, channels_last
    eps: float = 1e-5
    x_scale: float = 1.0  # x stands for (x - x_zero) * x_scale, and so on
    x_zero: int = 0
    residual_scale: float = 1.0
    residual_zero: int = 0
    y_scale: float = 1.0  # of a result in uint8
    y_zero: int = 0
    reuse: bool = False  # the result may be written over the residual, which nobody reads again


class NormProblem(NamedTuple):
    """A batch norm with what follows it, in training: the problem of the families `bn_act*`."""

    device: str
    dtype: str
    N: int
    H: int
    W: int
    C: int
    activation: str = "relu"  # "identity", "relu" or "relu6"
    shortcut: str = ""  # what is added before the activation: "", "tensor", or "norm" for a tensor with its own norm

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.C, self.H, self.W)

    @property
    def depth(self) -> int:
        """Terms of the longest sum behind one result: the elements of a channel."""
        return self.N * self.H * self.W

    @property
    def bytes(self) -> int:
        """Fewest bytes through memory of the forward launch: x and the shortcut read, y and its mask written."""
        elements = self.N * self.H * self.W * self.C
        return elements * ELEMENT_BYTES[self.dtype] * (2 + bool(self.shortcut)) + elements // 8

    @property
    def flops(self) -> int:
        return 0

    @property
    def layer(self) -> NormProblem:
        return self._replace(N=1)

    @property
    def id(self) -> str:
        shortcut = f"add_{self.shortcut}+" if self.shortcut else ""
        return f"n{self.N}c{self.C}h{self.H}w{self.W}-{shortcut}{self.activation}-{self.dtype}-{self.device}"


class GradOperands(NamedTuple):
    """What the families `conv_dgrad` and `conv_wgrad` read; the contract stands in `ops.conv_grad`."""

    dy: Any  # [N, K, P, Q]: du, or dz where `u` is given
    weight: Any = None  # [K, C / groups, R, S]
    u: Any = None  # [N, K, P, Q]: the convolution's output, whose norm's gradient is still to be taken
    gamma: Any = None  # [K], as are mean and var
    mean: Any = None
    var: Any = None
    means: Any = None  # [2, K]: s0 and s1 of `ops.bn_act`
    x: Any = None  # [N, C, H, W]: the convolution's input, or with a prologue what the prologue normalises
    pre_gamma: Any = None  # [C], as are the other pre_ vectors
    pre_beta: Any = None
    pre_mean: Any = None
    pre_var: Any = None
    residual: Any = None  # [N, C, H, W], added to dx
    mask: Any = None  # bits of `residual`: where it counts; None for everywhere
    eps: float = 1e-5
    pre_eps: float = 1e-5
    reuse: bool = False
