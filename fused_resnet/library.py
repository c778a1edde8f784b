"""Registration of operators: the only file that touches torch.library.

An operator is one contract: a schema, an implementation that chooses its kernel on real tensors,
a fake for tracing, and a reference in plain torch. Under autograd with anything that requires a
gradient the reference runs, so that gradients are those of stock PyTorch until a family brings
its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "fused_resnet"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Gives an operator of a compiled library, `fused_resnet::<name>`, its fake."""
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def unknown_size() -> Any:
    """Inside a fake: a size that only running the operator tells."""
    return torch.library.get_ctx().new_dynamic_size()


def define_op(schema: str, run: Callable[..., Any], fake: Callable[..., Any], reference: Callable[..., Any]) -> Any:
    """Defines `fused_resnet::<schema>` and returns its overload.

    Args:
        schema: name, arguments and results in torch's schema language, without the namespace.
        run: the implementation, for every device.
        fake: shapes, dtypes and strides only; must allocate as `run` does.
        reference: plain torch with the arguments of `run`; serves autograd.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return reference(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, autograd, "Autograd")
    return op
