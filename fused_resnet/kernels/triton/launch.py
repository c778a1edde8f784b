"""The only place where a Triton kernel is launched, and where the device's architecture is asked."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

# What the interpreter's launches are planned for: it has no architecture of its own.
INTERPRETED_ARCH = 90


@functools.cache
def arch_of(device: torch.device) -> int:
    """Compute capability without the dot (90 for Hopper); on a CPU the one that the interpreter stands in for."""
    if device.type != "cuda":
        return INTERPRETED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel: Any, programs: int, arguments: Mapping[str, Any], device: torch.device,
           options: Mapping[str, int]) -> None:
    """Runs `programs` instances of `kernel` on the device that holds its tensors.

    Args:
        kernel: a `@triton.jit` function.
        programs: size of the one-dimensional grid.
        arguments: value of every parameter of the kernel.
        device: where every tensor of `arguments` lives; a CPU needs the Triton interpreter.
        options: num_warps and num_stages.
    """
    if device.type == "cuda":
        # Triton launches on the current device, whichever device its pointers belong to.
        with torch.cuda.device(device):
            kernel[(programs,)](**arguments, **options)
    else:
        kernel[(programs,)](**arguments, **options)
