"""lower(program): raw operators in an exported program, which then needs no Python to run them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import fx

from fused_resnet import native

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_log = logging.getLogger(__name__)
# Batch norms that take the batch's statistics -> where their arguments say so; always, if nowhere.
_TRAINING = {"batch_norm": 5, "_native_batch_norm_legit": 5, "native_batch_norm": 5, "cudnn_batch_norm": 5,
             "_native_batch_norm_legit_functional": 5, "_batch_norm_with_update": None,
             "_batch_norm_with_update_functional": None}


def lower(program: ExportedProgram) -> ExportedProgram:
    """The same program on raw operators `fused_resnet::_conv_bn_act` and `_stem`, for packages that run without Python.

    Chains of convolution, batch norm in inference, residual add and activation become one operator each, and so do
    the public operators of `fused_resnet.functional`. What the raw operators cannot compute stays as it is. Inputs,
    outputs and their strides, the state dict and symbolic sizes are those of `program`, which is left alone. A lowered
    program is for inference; `torch.export.load` of one needs `fused_resnet.native.missing("cpu")` called before, which
    loads the library, and a package of one needs the library loaded by the program that runs it.

    Args:
        program: what `torch.export.export(model.eval(), ...)` gave for a stock or a fused model.

    Returns:
        A new program; `fused_resnet.report` lists its convolutions.

    Raises:
        TypeError: `program` is not an ExportedProgram.
        ValueError: it was exported in training mode.
        RuntimeError: the native library, or its part for the program's device, is not there.
    """
    from torch.export import ExportedProgram  # these take their time to import

    from fused_resnet.fusing import rewrite

    if not isinstance(program, ExportedProgram):
        raise TypeError(f"lower() takes what torch.export.export returns, not {type(program).__name__}")
    _refuse_training(program.graph)
    tensors = [v for node in program.graph.nodes if isinstance(v := node.meta.get("val"), torch.Tensor)]
    for part in native.PARTS:
        needed = part == "cpu" or any(v.device.type == part for v in tensors)  # that of the CPU defines the operators
        if needed and (reason := native.refusal(part)) is not None:
            raise RuntimeError(f"lower() needs {reason}")
    lowered = rewrite.rewritten(program)
    _log.info(rewrite.listed(lowered).counted)
    return lowered


def _refuse_training(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if getattr(node.target, "namespace", "") != "aten" or node.target._overloadname == "no_stats":
            continue
        name = node.target._opname
        at = _TRAINING.get(name, -1)
        if at != -1 and node.args[3] is not None and (at is None or node.args[at]):
            raise ValueError(f"lower() takes programs for inference, but {node.name} uses the statistics of its batch; "
                             "export model.eval()")
