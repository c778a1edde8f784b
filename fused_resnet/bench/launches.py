"""Counts what a call launches, by watching it with torch.profiler: never by reading the plan.

On a CPU a launch is an operator that does arithmetic or moves data; on CUDA it is a kernel. Nested
operators are counted once, at the outermost name that says what they compute (`aten::conv2d` calls
`aten::convolution` calls `aten::mkldnn_convolution`: one convolution). Our own operators are looked
through, so that a fallback to the reference shows as the convolution, norm and ReLU that it runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PREFIX = "fused_resnet::"
CATEGORIES = ("conv", "norm", "activation", "add", "pool", "linear", "other")
EPILOGUES = ("norm", "activation", "add")  # what a fused row must not launch on its own

# What our own operators are, if not convolutions; `_image` only finds memory.
OWN = {"fused_resnet::_max_pool": "pool", "fused_resnet::_mean_pool": "pool", "fused_resnet::_quantize": "other",
       "fused_resnet::_is_finite": "other", "fused_resnet::_image": None}

_NAMES = {
    "conv": r"conv(olution|_transpose|_tbc|_depthwise)?([123]d|_\w+)?$|(mkldnn|cudnn|miopen|thnn|slow)_conv\w*|"
            r"_convolution\w*|_reorder_convolution\w*",
    "norm": r"(_?native_|cudnn_|miopen_|_)?batch_norm\w*|(native_)?(group|layer)_norm|instance_norm",
    "activation": r"(leaky_)?relu6?_?|clamp(_min|_max)?_?|hardtanh_?|silu_?|hardswish_?|hardsigmoid_?|sigmoid_?|gelu_?|"
                  r"elu_?|prelu|mish_?|tanh_?|threshold_?|(threshold|hardtanh|relu|silu|hardswish)_backward",
    "add": r"add_?|_add_relu_?|add_relu_?",
    "pool": r"(adaptive_)?(avg|max)_pool[123]d\w*|mean|quantized_max_pool\w*",
    "linear": r"linear|addmm|mm|matmul|bmm|addbmm|baddbmm|_linear_pointwise\w*|mkldnn_linear",
}
_CATEGORY = {name: re.compile(pattern) for name, pattern in _NAMES.items()}
# Operators that only make or read metadata. `empty` and friends allocate without writing.
_FREE = re.compile(
    r"view\w*|_?reshape\w*|flatten|unflatten|expand\w*|transpose_?|t|permute|as_strided_?|select|slice|narrow|squeeze_?|"
    r"unsqueeze_?|detach_?|alias|empty\w*|new_empty\w*|resize_?|resize_as_?|set_|resolve_\w+|to|contiguous|item|"
    r"_local_scalar_dense|is_\w+|size|stride|lift_fresh|unbind|split\w*|chunk|result_type|_unsafe_view|numpy_T|"
    r"conj|ones|zeros|record_stream|_has_compatible_shallow_copy_type|_nnpack_available|cudnn_is_acceptable")


def category(name: str) -> str | None:
    """What the operator `namespace::name` computes: a key of `CATEGORIES`, None if it computes nothing."""
    namespace, _, operator = name.rpartition("::")
    operator = operator.split(".")[0]
    if not namespace or namespace in ("autograd::engine", "torch::autograd"):  # the engine's own bookkeeping
        return None
    if namespace != PREFIX.rstrip(":"):
        for key, pattern in _CATEGORY.items():
            if pattern.fullmatch(operator):
                return key
    return None if namespace == "aten" and _FREE.fullmatch(operator) else "other"


def _is_op(event: Any) -> bool:
    return "::" in event.name and not getattr(event, "is_user_annotation", False)


def _ours(event: Any) -> bool:
    return _is_op(event) and event.name.startswith(PREFIX)


def _walk(event: Any, kernels: bool) -> Iterator[tuple[str, Any]]:
    """Yields (category, event) for each launch under `event`, nested operators counted once."""
    kind = category(event.name) if _is_op(event) and not _ours(event) else None
    if kind not in (None, "other"):
        yield str(kind), event
        return
    below = [launch for child in event.cpu_children for launch in _walk(child, kernels)]
    if not below and _ours(event):
        own = OWN.get(event.name, "conv")
        below = [] if own is None else [(own, event)]  # a kernel of our own that calls no operator
    elif not below and kind == "other":
        below = [("other", event)]
    yield from below


def _kernels(event: Any) -> int:
    """CUDA kernels that `event` and everything under it launched."""
    return len(event.kernels) + sum(_kernels(child) for child in event.cpu_children)


def _count(event: Any, kernels: bool) -> Counter[str]:
    counted: Counter[str] = Counter()
    for kind, launch in _walk(event, kernels):
        counted[kind] += _kernels(launch) if kernels else 1
    return +counted


def _profile(fn: Callable[[], object], kernels: bool) -> Any:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * kernels
    with profile(activities=activities, acc_events=True) as recorded:
        fn()
        if kernels:
            torch.cuda.synchronize()
    return recorded.events()


def _host(events: Any) -> Iterator[Any]:
    """The outermost events of the host, in order."""
    return (e for e in events if e.cpu_parent is None and e.device_type == torch.autograd.DeviceType.CPU)


def count(fn: Callable[[], object], *, device: str = "cpu") -> Counter[str]:
    """Counts the launches of one call.

    Args:
        fn: called once; warm it up first, so that packing and compiling are not counted.
        device: "cpu" counts operators, "cuda" counts kernels. Kernels that belong to no operator (a
            replayed graph, a compiled module) are counted as "other".

    Returns:
        launches by category, a category that did not occur is absent.
    """
    kernels = device == "cuda"
    events = _profile(fn, kernels)
    counted: Counter[str] = Counter()
    for event in _host(events):
        counted += _count(event, kernels)
    if kernels:
        counted["other"] += max(0, len(_ran(events)) - sum(counted.values()))
    return +counted


def _ran(events: Any) -> list[str]:
    """Names of the CUDA kernels among the events, in order; copies and fills by the driver are none."""
    return [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA
            and not e.name.startswith(("Memset", "Memcpy")) and not getattr(e, "is_user_annotation", False)]


def kernel_names(fn: Callable[[], object]) -> Counter[str]:
    """Counts the CUDA kernels that one call runs, by their names."""
    return Counter(_ran(_profile(fn, True)))


def per_label(fn: Callable[[], object], *, device: str = "cpu") -> dict[str, Counter[str]]:
    """Counts the launches of one call under each `record_function("fused_resnet::<name>")` that it enters.

    Returns:
        <name> -> launches by category; an entry for every label that was entered, summed over its calls.
        Labels may nest: an inner label's launches are counted for the outer one as well.
    """
    found: dict[str, Counter[str]] = {}
    for event in _profile(fn, device == "cuda"):
        if event.name.startswith(PREFIX) and event.is_user_annotation \
                and event.device_type == torch.autograd.DeviceType.CPU:
            name = event.name[len(PREFIX):]
            found.setdefault(name, Counter()).update(_count(event, device == "cuda"))
    return found


def order_per_label(fn: Callable[[], object]) -> dict[str, list[str]]:
    """The categories of the operators under each label in the order in which they ran, on the host.

    Returns:
        <name> -> categories, those of several calls one after the other.
    """
    found: dict[str, list[str]] = {}
    for event in _profile(fn, False):
        if event.name.startswith(PREFIX) and event.is_user_annotation:
            below = sorted((launch for launch in _walk(event, False)), key=lambda pair: pair[1].time_range.start)
            found.setdefault(event.name[len(PREFIX):], []).extend(kind for kind, _ in below)
    return found


def ran_fused(launches: Counter[str]) -> bool:
    """Whether a label ran fused: it convolved, and no batch-norm, add or ReLU operator ran beside it."""
    return launches["conv"] > 0 and not any(launches[kind] for kind in EPILOGUES)


def describe(launches: Counter[str]) -> str:
    """`53 conv + 53 norm + 49 activation + 16 add + 2 pool + 1 linear`."""
    return " + ".join(f"{launches[kind]} {kind}" for kind in CATEGORIES if launches[kind]) or "none"
