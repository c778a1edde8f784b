"""Raw operators in the graph of an exported program, and the layouts that follow from them.

Raw operators take and give channels_last memory. Around them the graph is walked once more with the layouts that
follow from that, on fake tensors: ATen's operators compute on as they are, what depends on strides (views that no
longer fit, operators of others, the program's outputs) gets the layout that export recorded.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fused_resnet import backends
from fused_resnet.fusing.chains import CONVOLUTIONS, Chain, arguments, aten, chains, dense_vector, value
from fused_resnet.fusing.report import Report, Row
from fused_resnet.numerics import NAMES
from fused_resnet.ops import conv_bn_act, stem

_BY_STRIDES = {"as_strided", "as_strided_copy", "as_strided_scatter", "sym_stride", "sym_storage_offset", "set_"}
_CHANNELS_LAST = (0, 2, 3, 1)


def rewritten(program: ExportedProgram) -> ExportedProgram:
    """`program`, which is for inference, on raw operators; the native library is loaded."""
    functional = program.run_decompositions({conv_bn_act.OP: _conv_bn_act, stem.OP: _stem})
    found = {chain.end: chain for chain in chains(functional.graph, _fits)}
    with torch.no_grad():
        return _Rewriter(functional, found).program()


def listed(program: ExportedProgram) -> Report:
    """The convolutions of a program: `fused` what runs as a raw operator, `skipped` what ATen runs."""
    if not isinstance(program, ExportedProgram):
        raise ValueError("report() takes a model that fuse() returned, or an exported program")
    parameters = program.graph_signature.inputs_to_parameters
    rows = []
    for node in program.graph.nodes:
        if not (raw := node.target in _raw()) and node.target not in CONVOLUTIONS:
            continue
        weight = node.args[1].name
        name = parameters.get(weight, weight).removesuffix(".weight")
        device = value(node).device.type
        rows.append(Row(name, _pattern(node), "fused", device, "") if raw else
                    Row(name, "", "skipped", "", "no raw operator computes it with what stands around it"))
    return Report(tuple(rows))


def _pattern(node: fx.Node) -> str:
    a = arguments(node)
    there = {"norm": a.get("pre_mean"), "act": a.get("prologue", "") not in ("", "identity")}, {
        "norm": a["mean"], "add": a.get("residual"), "act": a["activation"] != "identity",
        "maxpool": node.target is torch.ops.fused_resnet._stem.default}
    before, behind = ([name for name, part in parts.items() if part] for parts in there)
    return "+".join([*before, "conv", *behind])


def _raw() -> tuple:
    """The raw operators; none before the library is loaded."""
    ops = torch.ops.fused_resnet
    return (ops._conv_bn_act.default, ops._stem.default) if hasattr(ops, "_conv_bn_act") else ()


def _conv_bn_act(*args: Any) -> torch.Tensor:
    return conv_bn_act.reference(*args).contiguous(memory_format=torch.channels_last)


def _stem(*args: Any) -> torch.Tensor:
    return stem.reference(*args).contiguous(memory_format=torch.channels_last)


def _fits(chain: Chain) -> bool:
    """Whether a raw operator computes `chain` on its device."""
    c, x, weight = chain.conv, value(chain.x), value(chain.conv.weight)
    result = value(chain.end)
    if x.dtype not in NAMES or not x.dtype == weight.dtype == result.dtype or x.device != weight.device:
        return False
    if c.bias is not None and not dense_vector(c.bias):
        return False
    if x.shape[1] != weight.shape[1] * c.groups or min(c.padding) < 0:
        return False
    if chain.pooled and (c.groups != 1 or c.dilation != (1, 1) or x.device.type != "cpu"):
        return False
    return _has_kernel("_conv_bn_act", x) and (x.device.type != "cuda" or _fits_cuda(chain, x, weight))


def _has_kernel(name: str, x: torch.Tensor) -> bool:
    key = x.device.type.upper()
    return key in ("CPU", "CUDA") and torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_resnet::{name}", key)


def _fits_cuda(chain: Chain, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the chooser's backend cuda would take it, for one image; symbolic sizes have those of the example."""
    c = chain.conv
    problem = conv_bn_act.problem_of(x, weight, c.bias, chain.norm, chain.residual, chain.activation, chain.prologue,
                                     c.stride, c.padding, c.dilation, c.groups)
    height, width = (getattr(getattr(size, "node", None), "hint", size) for size in x.shape[2:])
    return dict(backends.explain(problem._replace(N=1, H=height, W=width)))["cuda"] is None


def _same(a: Any, b: Any) -> bool:
    return a is b or statically_known_true(a == b)


def _strides(v: torch.Tensor, order: tuple[int, ...]) -> list[Any]:
    """The strides of a dense tensor whose dimensions lie in `order`, the outermost first."""
    strides, step = [0] * v.dim(), 1
    for d in reversed(order):
        strides[d] = step
        step = step * v.shape[d]
    return strides


def _lies_in(v: torch.Tensor, order: tuple[int, ...]) -> bool:
    """Whether `v` is dense in `order`; the strides of dimensions of one element do not count."""
    return all(_same(v.shape[d], 1) or _same(v.stride(d), s) for d, s in enumerate(_strides(v, order)))


def _same_layout(a: Any, b: Any, exact: bool = False) -> bool:
    """Whether tensors of one shape have the same strides, if `exact` also where a dimension has one element."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return True
    return all((not exact and _same(n, 1)) or _same(s, t)
               for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


class _Rewriter:
    """Copies a graph, chains as raw operators, and the layouts that follow from them."""

    def __init__(self, program: ExportedProgram, found: dict[fx.Node, Chain]):
        self.old, self.found = program, found
        self.graph = fx.Graph()
        self.graph.set_codegen(program.graph._codegen)
        self.new: dict[fx.Node, fx.Node] = {}  # node of the old graph -> of the new one
        self.layouts: dict[tuple[fx.Node, Any], fx.Node] = {}
        self.skipped = {node for chain in found.values() for node in (*chain.nodes, *chain.inner)} - set(found)
        self.fake_mode = detect_fake_mode([value(node) for node in program.graph.nodes])

    def program(self) -> ExportedProgram:
        old, signature = self.old, self.old.graph_signature
        for node in old.graph.nodes:
            if node in self.found:
                self.new[node] = self._launch(self.found[node])
            elif node.op == "output":
                names = self._output(node)
            elif node not in self.skipped:
                self.new[node] = self._copy(node)
        self.graph.lint()
        module = fx.GraphModule(old.graph_module, self.graph)
        module.meta.update(old.graph_module.meta)
        for spec in signature.output_specs:  # of the decomposed program, which is ours
            spec.arg.name = names.get(spec.arg.name, spec.arg.name)
        return ExportedProgram(
            root=module, graph=self.graph, graph_signature=signature, state_dict=old.state_dict,
            range_constraints=old.range_constraints, module_call_graph=old.module_call_graph,
            example_inputs=old.example_inputs, constants=old.constants, verifiers=old.verifiers)

    def _call(self, op: Any, *args: Any, name: str | None = None, meta: dict | None = None, **kwargs: Any) -> fx.Node:
        """A call of `op` in the new graph with the fake of its result."""
        node = self.graph.create_node("call_function", op, args, kwargs, name)
        node.meta = dict(meta or {})
        fakes = fx.node.map_arg((args, kwargs), value)
        with self.fake_mode, enable_python_dispatcher():
            node.meta["val"] = op(*fakes[0], **fakes[1])
        return node

    def _launch(self, chain: Chain) -> fx.Node:
        """The raw operator for a chain, in the place of its last node."""
        c, norm, pre = chain.conv, chain.norm, chain.pre
        at = self._at
        operands = [self._vector(v) for v in (c.bias, *(norm[:4] if norm else (None,) * 4))]
        given: dict[str, Any] = {"name": chain.end.name, "meta": chain.end.meta}
        ops = torch.ops.fused_resnet
        if chain.pooled and norm:
            return self._call(ops._stem.default, at(chain.x), at(c.weight), *operands, norm.eps, chain.activation,
                              c.stride, c.padding, **given)
        return self._call(
            ops._conv_bn_act.default, self._channels_last(at(chain.x)), self._weight(at(c.weight)), *operands,
            self._channels_last(at(chain.residual)), *(map(at, pre[:4]) if pre else (None,) * 4),
            norm.eps if norm else 1e-5, pre.eps if pre else 1e-5, chain.activation, chain.prologue, c.stride,
            c.padding, c.dilation, c.groups, **given)

    def _copy(self, node: fx.Node) -> fx.Node:
        """An operator of ATen on what its operands are now; others get operands as they were exported."""
        if self._format(node) and self._lies_as_cloned(node):
            return self._at(node.args[0])
        before = [n for n in node.all_input_nodes if n in self.new]
        if all(_same_layout(value(n), value(self._at(n))) for n in before):
            return self.graph.node_copy(node, self._at)
        if self._follows_strides(node):
            copied = self.graph.node_copy(node, self._at)
            try:
                fakes = fx.node.map_arg((copied.args, copied.kwargs), value)
                with self.fake_mode, enable_python_dispatcher():
                    copied.meta["val"] = node.target(*fakes[0], **fakes[1])  # type: ignore[operator]
                return copied
            except (RuntimeError, ValueError):  # a view that does not fit
                self.graph.erase_node(copied)
        return self.graph.node_copy(node, self._as_exported)

    def _follows_strides(self, node: fx.Node) -> bool:
        """Whether a call computes the same values whatever the layout of its operands."""
        v = value(node)
        if isinstance(v, torch.Tensor) and not _lies_in(v, _order(v)):  # expanded: only its operand can be restored
            return False
        return node.target is operator.getitem or (
            isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
            and node.target._opname not in _BY_STRIDES)

    def _format(self, node: fx.Node) -> Any:
        return node.kwargs.get("memory_format") if node.target is aten.clone.default else None

    def _lies_as_cloned(self, node: fx.Node) -> bool:
        v, now = value(node), value(self._at(node.args[0]))
        return now is not value(node.args[0]) and _same_layout(v, now, exact=True)

    def _at(self, node: Any) -> Any:
        return self.new[node] if isinstance(node, fx.Node) else node

    def _as_exported(self, node: fx.Node, exact: bool = False) -> fx.Node:
        """The new node for an old one, in the layout of the old one."""
        now, v = self._at(node), value(node)
        if _same_layout(v, value(now), exact):
            return now
        return self._once(now, _order(v), exact)

    def _channels_last(self, node: fx.Node | None) -> fx.Node | None:
        if node is None or _lies_in(value(node), _CHANNELS_LAST):
            return node
        return self._once(node, _CHANNELS_LAST)

    def _vector(self, node: fx.Node | None) -> fx.Node | None:
        """CUDA's kernels read vectors in fp32, the CPU's in any floating dtype."""
        v, now = value(node), self._at(node)
        if v is None or v.device.type == "cpu" or v.dtype == torch.float32:
            return now
        return self._call(aten._to_copy.default, now, dtype=torch.float32)

    def _weight(self, node: fx.Node) -> fx.Node:
        """CUDA's kernels read weights in channels_last memory, the CPU's in any strides."""
        return node if value(node).device.type == "cpu" else self._channels_last(node)  # type: ignore[return-value]

    def _once(self, node: fx.Node, order: tuple[int, ...], exact: bool = False) -> fx.Node:
        """`node` laid out densely in `order`, one copy for all who ask."""
        key = node, (order, exact)
        if key not in self.layouts:
            self.layouts[key] = self._laid_out(node, order)
        return self.layouts[key]

    def _laid_out(self, node: fx.Node, order: tuple[int, ...]) -> fx.Node:
        if order in (tuple(range(len(order))), _CHANNELS_LAST):
            memory = torch.channels_last if order == _CHANNELS_LAST else torch.contiguous_format
            return self._call(aten.clone.default, node, memory_format=memory)
        dense = self._call(aten.clone.default, self._call(aten.permute.default, node, list(order)),
                           memory_format=torch.contiguous_format)
        return self._call(aten.permute.default, dense, [order.index(d) for d in range(len(order))])

    def _output(self, node: fx.Node) -> dict[str, str]:
        """Outputs with the strides that were exported; returns the names that changed."""
        out = self.graph.node_copy(node, lambda n: self._as_exported(n, exact=True))
        return {before.name: after.name for before, after in zip(
            node.all_input_nodes, out.all_input_nodes, strict=True) if before.name != after.name}


def _order(v: torch.Tensor) -> tuple[int, ...]:
    """The order that the dimensions of a tensor lie in, the outermost first."""
    order = list(range(v.dim()))
    for i in range(v.dim()):  # insertion: symbolic strides compare only where it is known
        for j in range(i, 0, -1):
            if statically_known_true(v.stride(order[j - 1]) < v.stride(order[j])):
                order[j - 1], order[j] = order[j], order[j - 1]
    return tuple(order)
