"""What the user decides through environment variables, each read once; the only reader of them.

    FUSED_RESNET_BACKEND         force a backend, as `backends.use` does
    FUSED_RESNET_DISABLE=1       run stock forwards everywhere
    FUSED_RESNET_SELF_CHECK      first (default) | always | off
    FUSED_RESNET_CACHE_DIR       where verdicts and tuned rows are kept (default ~/.cache/fused_resnet)
    FUSED_RESNET_WINOGRAD=0      no convolution by Winograd's algorithm
    FUSED_RESNET_SKIP_LOADING=1  leave the native library alone
"""

from __future__ import annotations

import functools
import os
from pathlib import Path


@functools.cache
def setting(name: str, default: str = "") -> str:
    """The environment variable FUSED_RESNET_<name>, read once."""
    return os.environ.get(f"FUSED_RESNET_{name}", default)


def switched(name: str) -> bool:
    """Whether the variable is set, to anything but 0."""
    return setting(name) not in ("", "0")


def enabled() -> bool:
    """False when FUSED_RESNET_DISABLE is set: every module then runs its stock forward."""
    return not switched("DISABLE")


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def cache_folder() -> Path:
    """Where this user's verdicts and tuned rows are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(setting("CACHE_DIR") or os.path.join(home, "fused_resnet"))
