"""quantize: post-training quantisation to 8 bits of what `fuse` has planned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from fused_resnet.fusing import ranges
from fused_resnet.fusing.apply import fuse, plans
from fused_resnet.fusing.int8_steps import Int8Launch, Int8Plan, Int8Pool, poolable, quantised_conv
from fused_resnet.fusing.plan import Plan
from fused_resnet.fusing.ranges import METHODS, Range
from fused_resnet.fusing.steps import Call, Launch, Slot, fill_slots

Model = TypeVar("Model", bound=nn.Module)


def quantize(model: Model, samples: torch.Tensor | Iterable[Any], *, inplace: bool = False, method: str = "minmax",
             residual: str = "uint8", memory_format: torch.memory_format | None = None) -> Model:
    """Fuses a model so that its convolutions run on 8-bit integers on the CPU, after calibrating it on samples.

    Activations become uint8 with a scale and a zero point for each tensor, weights int8 with a scale for each filter
    and the batch norm folded in:

        q = clamp(round(r / scale) + zero, 0, 255)
        y = act((sum((qx - zero_x) * qw) * scale_x * scale_w[k] + shift[k]) + residual)

    with sums in 32-bit integers and the rest in fp32, rounded once (Jacob et al., arXiv:1712.05877; scales by filter:
    Krishnamoorthi, arXiv:1806.08342). Between quantised convolutions, max-pools and residual adds values stay uint8;
    whatever else reads a value gets fp32. Weights are quantised from the live parameters, anew when these change;
    the scales of activations stay what the samples said: quantise again after training. In training mode, with
    gradients, on other devices and dtypes and under autocast the model runs as `fuse` would have it. `report` tells
    what stays in float and why, `verify` the error and how often the first class is the same.

    Args:
        model: any module in eval mode with parameters in fp32; plans that it has are made anew.
        samples: a tensor [N, C, H, W], one input batch, or an iterable of batches, each a tensor or a tuple of inputs:
            a few dozen pictures such as the model will meet.
        inplace: attach to `model` itself; default is a deep copy.
        method: how a range becomes a scale. "minmax" covers all that was seen; "percentile" leaves out the outermost
            0.01 % of the numbers at either end; "mse" takes the range of the least squared error.
        residual: what a tensor is kept in that only residual adds read: "uint8", or "fp32", which is finer and moves
            four times the bytes.
        memory_format: as in `fuse`.

    Returns:
        The quantised model.

    Raises:
        ValueError: the model is in training mode or cannot be fused, there is no sample, or an option is unknown.
    """
    if method not in METHODS or residual not in ("uint8", "fp32"):
        raise ValueError(f"method is one of {', '.join(METHODS)}, residual uint8 or fp32; got {method!r}, {residual!r}")
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("quantize() is for inference: call .eval() on the model first")
    fused = fuse(model, inplace=inplace, memory_format=memory_format)
    seen = _calibrate(fused, [samples] if isinstance(samples, torch.Tensor) else samples, method != "minmax")
    for plan in plans(fused).values():
        if seen[id(plan)] and plan.broken is None:
            Int8Plan(plan, *_quantised(plan, seen[id(plan)], method, residual)).attach()
    for plan in plans(fused).values():  # guards watch the plans of inner modules
        plan.arm()
    return fused


def _calibrate(model: nn.Module, samples: Iterable[Any], keep: bool) -> dict[int, dict[int, Range]]:
    """Runs the samples; id of a plan -> slot -> its range."""
    attached = list(plans(model).values())
    before = [plan.steps for plan in attached]
    seen: dict[int, dict[int, Range]] = {id(plan): {} for plan in attached}
    count = 0
    generator = torch.get_rng_state()
    try:
        for plan in attached:
            plan.steps = ranges.watched(plan.steps, seen[id(plan)], keep)
        with torch.no_grad():
            for sample in samples:
                model(*(sample if isinstance(sample, tuple | list) else (sample,)))
                count += 1
    finally:
        torch.set_rng_state(generator)
        for plan, steps in zip(attached, before, strict=True):
            plan.steps = steps
    if not count:
        raise ValueError("quantize() needs at least one batch of samples")
    return seen


def _quantised(plan: Plan, seen: dict[int, Range], method: str, residual: str) -> tuple[list, dict[str, str]]:
    """The steps of a plan in int8, and why launches stay in float."""
    reasons: dict[str, str] = {}
    able: dict[int, Launch] = {}
    for step in plan.launches:
        reason = quantised_conv(step)
        if reason is None and not all(slot in seen and seen[slot].finite for slot in (step.x, step.out)):
            reason = "no sample reached it, or not with finite values"
        if reason is None:
            able[id(step)] = step
        else:
            reasons[step.name] = reason
    narrow = _narrow(plan, able, residual == "uint8")
    scales = {slot: seen[root].affine(method) for slot, root in narrow.items()}
    steps: list[Any] = []
    for step in plan.steps:
        if id(step) in able:
            x = scales.get(step.x) or seen[step.x].affine(method)
            steps.append(Int8Launch(step, x, scales.get(step.residual), scales.get(step.out)))
        elif poolable(step) and step.out in narrow:
            steps.append(Int8Pool(step))
        else:
            steps.append(step)
    return steps, reasons


def _narrow(plan: Plan, able: dict[int, Launch], residuals: bool) -> dict[int, int]:
    """The slots that are kept in uint8, each with the slot whose range counts: pools hand theirs on."""
    readers: dict[int, list[tuple[Any, str]]] = {}
    for step in plan.steps:
        if isinstance(step, Launch):
            readers.setdefault(step.x, []).append((step, "x"))
            if step.residual is not None:
                readers.setdefault(step.residual, []).append((step, "residual"))
        elif isinstance(step, Call):
            fill_slots((step.args, step.kwargs), lambda a: readers.setdefault(a.at, []).append((step, "")))  # noqa: B023
    shown: set[int] = set()
    fill_slots(plan.output, lambda a: shown.add(a.at))
    pools = {step.out: step.args[0].at for step in plan.steps if poolable(step) and type(step.args[0]) is Slot}
    root = {step.out: step.out for step in able.values()}
    for out, source in pools.items():
        if source in root:
            root[out] = root[source]
    slots = set(root) - shown

    def fits(slot: int) -> bool:
        if slot in pools and pools[slot] not in slots:
            return False
        kinds = readers.get(slot, [])
        if not residuals and all(kind == "residual" for _, kind in kinds):
            return False
        return bool(kinds) and all(id(step) in able or step.out in pools and step.out in slots for step, _ in kinds)

    while wrong := {slot for slot in slots if not fits(slot)}:
        slots -= wrong
    return {slot: root[slot] for slot in slots}
