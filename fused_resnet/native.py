"""The compiled libraries: raw operators `fused_resnet::_f`, for programs without Python and for kernels that call them.

`csrc/` has a part for the CPU, which defines all schemas, and a part for CUDA. Each is one library on the stable ABI of
libtorch 2.11, loaded when it is first asked for, never at import. FUSED_RESNET_SKIP_LOADING=1 leaves both out.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fused_resnet.library import register_fake, unknown_size
from fused_resnet.settings import switched

PARTS = ("cpu", "cuda")
FOLDER = Path(__file__).parent
OLDEST_TORCH = (2, 11)
# Argument `tile` of _conv_bn_act on CUDA: the kernel, and pixels x filters a block; -1 lets a rule decide.
CONV_TILES = ("mma_128x64", "mma_128x128", "sm90_128x64", "sm90_128x128", "sm90_256x128")
_log = logging.getLogger(__name__)


@functools.cache
def missing(part: str) -> str | None:
    """Loads a part of the library when it is called first.

    Args:
        part: "cpu" or "cuda".

    Returns:
        None where the part's operators can be called, else the reason why not.
    """
    reason = _missing(part)
    if reason is not None:
        _log.info("the %s part of the native library is not there: %s", part, reason)
    return reason


def refusal(part: str, capability: tuple[int, int] | None = None) -> str | None:
    """`missing`, for whoever does not know what a part is a part of; for a GPU also whether it holds code for it."""
    reason = missing(part) or (_foreign(*capability) if capability else None)
    return reason and f"the native library's {part.upper()} part: {reason}"


def without_sm90() -> str | None:
    """Why the tiles "sm90" of the convolution are not in the CUDA part, or None."""
    return _note().get("sm90", "the library was built without them")


def _foreign(major: int, minor: int) -> str | None:
    """Why the code for the architectures that the library was built for does not run on this capability, or None.

    Code for 8.0 runs on 8.9, not on 9.0; code for 90a runs on 9.0 alone.
    """
    archs = _note().get("archs") or []
    for arch in archs:
        number = int(arch.rstrip("af"))
        if number == 10 * major + minor if arch[-1].isalpha() else number // 10 == major and number % 10 <= minor:
            return None
    return f"it holds code for sm_{', sm_'.join(archs)}, this GPU is sm_{major}{minor}" if archs else None


def path_of(part: str) -> Path:
    """Where the part's library is, if it was built."""
    return FOLDER / f"_C_{part}.so"


def _missing(part: str) -> str | None:
    if switched("SKIP_LOADING"):
        return "FUSED_RESNET_SKIP_LOADING is set"
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"the library needs torch 2.11 or newer, this is {torch.__version__}"
    if part == "cuda" and torch.version.cuda is None:
        return _verdict(part) or "built, but this build of torch has no CUDA"
    if not path_of(part).exists():
        return _verdict(part) or "it was not built"
    if part == "cuda" and missing("cpu") is not None:
        return f"the cpu part, which defines the operators, is not there: {missing('cpu')}"
    try:
        torch.ops.load_library(path_of(part))
    except OSError as error:
        return f"it cannot be loaded: {error}"
    if part == "cpu":
        absent = [name for name in FAKES if not hasattr(torch.ops.fused_resnet, name)]
        if absent:
            return f"it was built from other sources, without {', '.join(absent)}: install the package again"
        for name, fake in FAKES.items():
            register_fake(name, fake)
    return None


def _verdict(part: str) -> str | None:
    """What the build said about a part."""
    return _note().get(part)


def _note() -> dict[str, Any]:
    """What the build wrote down: part -> None or why it is missing; "archs" of the CUDA part; "sm90" as a part."""
    try:
        note = json.loads((FOLDER / "_native.json").read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _image(x: torch.Tensor, *shape: Any) -> torch.Tensor:
    return torch.empty(shape or x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_bn_act(x, gamma, beta, mean, var, eps, activation, *shortcut):
    count = 0 if activation == "identity" else (x.numel() + 7) // 8
    return _image(x), torch.empty(count, dtype=torch.uint8, device=x.device)


def _fake_bn_act_sums(dy, mask, x, mean, var, eps, residual, r_mean, r_var, r_eps):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty((2 if r_var is None else 3, x.shape[1]), dtype=dtype, device=x.device)


def _fake_bn_act_grad(dy, mask, x, gamma, mean, var, eps, means, shortcut, *norm):
    return _image(x), _image(x) if shortcut else torch.empty(0, dtype=x.dtype, device=x.device)


def _output_size(x, weight, stride, padding, dilation=(1, 1)):
    return [(x.shape[d] + 2 * padding[d - 2] - dilation[d - 2] * (weight.shape[d] - 1) - 1) // stride[d - 2] + 1
            for d in (2, 3)]


def _fake_conv_bn_act(x, weight, *rest, tile=-1):
    stride, padding, dilation = rest[14:17]
    return _image(x, x.shape[0], weight.shape[0], *_output_size(x, weight, stride, padding, dilation))


def _fake_conv_pack(weight, *rest, isa=""):
    # Its rows are as long as the processor's vectors want them.
    return torch.empty(unknown_size(), dtype=torch.uint8, device=weight.device)


def _fake_stem(x, weight, *rest):
    p, q = _output_size(x, weight, *rest[-2:])
    return _image(x, x.shape[0], weight.shape[0], (p + 1) // 2, (q + 1) // 2)


def _fake_bn_finalise(means, *rest):
    return tuple(means.new_empty(means.shape[1]) for _ in range(3))


def _fake_conv_int8_pack(weight, *rest, isa=""):
    return torch.empty(unknown_size(), dtype=torch.uint8, device=weight.device)


def _fake_conv_int8(x, pack, residual, filters, stride, padding, dilation, *rest):
    p, q = _output_size(x, pack.new_empty(1, 1, *filters[1:]), stride, padding, dilation)
    return torch.empty((x.shape[0], filters[0], p, q), dtype=torch.uint8 if rest[-1] else torch.float32,
                       device=x.device, memory_format=torch.channels_last)


def _fake_quantize(x, inverse, zero):
    return torch.empty_like(x, dtype=torch.uint8)


def _fake_max_pool(x, kernel, stride, padding):
    p, q = _output_size(x, x.new_empty(1, 1, *kernel), stride, padding)
    return _image(x, *x.shape[:2], p, q)


def _fake_play(given, packs, entries, numbers, results):
    raise NotImplementedError("a tape is data: what traces runs the launches one by one")


FAKES: dict[str, Callable[..., Any]] = {
    "_bn_act": _fake_bn_act, "_bn_act_sums": _fake_bn_act_sums, "_bn_act_grad": _fake_bn_act_grad,
    "_conv_bn_act": _fake_conv_bn_act, "_stem": _fake_stem,
    "_conv_pack": _fake_conv_pack, "_conv_packed": lambda y, *rest: None,
    "_image": lambda x, size: _image(x, *size), "_is_finite": lambda x: bool(x.isfinite().all()), "_play": _fake_play,
    "_bn_finalise": _fake_bn_finalise,
    "_conv_int8_pack": _fake_conv_int8_pack, "_conv_int8": _fake_conv_int8, "_quantize": _fake_quantize,
    "_max_pool": _fake_max_pool, "_mean_pool": lambda x: _image(x, *x.shape[:2], 1, 1)}
