"""Compilers, exporters and tracers make of a fused model what they make of stock: the same graph, so the same speed.

`EagerAndRecordGraphs` and its like stand in for inductor: what they are given is all that a compiler knows.
"""

import copy
import io
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs

import fused_resnet as fr
from fused_resnet.fusing import plans
from tests.fusing.beside import compare, exercise, models, same
from tests.fusing.nets import X

DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=64)},)
BOTH = pytest.mark.parametrize("made", ["called", "blocks"])
MODES = pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch._dynamo.reset()


def pair(made, mode=False):
    return [m.train(mode) for m in models(made)]


def nodes(graph):
    """All that a graph says, with the names of symbolic sizes in the order in which they appear."""
    names = {}

    def shape(value):
        return re.sub(r"s\d+", lambda m: names.setdefault(m[0], f"size{len(names)}"), str(getattr(value, "shape", "")))

    return [(n.op, n.op != "placeholder" and str(n.target), shape(n.meta.get("val", n.meta.get("example_value"))))
            for n in graph.nodes]


@BOTH
@MODES
@pytest.mark.parametrize("casts", [False, pytest.param(True, marks=pytest.mark.gate)], ids=["fp32", "autocast"])
def test_a_compiler_is_given_stocks_graph(made, mode, casts):
    """One graph each, with the same operators on the same sizes: whatever is made of it is as fast as of stock's."""
    given = []
    for model in pair(made, mode):
        torch._dynamo.reset()
        backend = EagerAndRecordGraphs()
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            compiled(X[..., :11].clone())
        given.append([nodes(g.graph) for g in backend.graphs])
    assert len(given[0]) == 1 and given[0] == given[1]


@BOTH
def test_no_graph_breaks_and_no_code_for_each_batch(made):
    counter = CompileCounter()
    fused = pair(made)[1]
    compiled = torch.compile(fused, backend=counter, dynamic=True)
    for batch in (2, 3, 5, 8):
        compiled(X[:1].expand(batch, -1, -1, -1).contiguous())
    assert counter.frame_count == 1
    compiled.train()(X)
    compiled.eval()(X)
    assert counter.frame_count == 2
    assert not sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.mark.gate
@BOTH
@pytest.mark.parametrize("compiled", [lambda m: torch.compile(m, backend="aot_eager"),
                                      lambda m: m.compile(backend="aot_eager") or m], ids=["function", "method"])
def test_compiled_models_train_and_evaluate_as_stock(made, compiled):
    stock, fused = pair(made, True)
    compiled = compiled(fused)
    for mine, theirs in zip(exercise(compiled), exercise(stock), strict=True):
        compare(mine, theirs, "compiled")
    same(dict(fused.state_dict()), dict(stock.state_dict()), "state")
    with torch.no_grad():
        same(copy.deepcopy(fused)(X), stock(X), "a copy")


@BOTH
@MODES
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.gate)])
def test_exported_programs_are_stocks(made, mode, strict):
    made = [torch.export.export(m, (X,), dynamic_shapes=DYNAMIC, strict=strict) for m in pair(made, mode)]
    assert nodes(made[0].graph) == nodes(made[1].graph)
    assert made[0].graph_signature == made[1].graph_signature
    file = io.BytesIO()
    torch.export.save(made[1], file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = torch.cat([X, X + 1, X])
    torch.manual_seed(0)
    wanted = made[0].module()(x)
    torch.manual_seed(0)
    same(loaded(x).detach(), wanted.detach(), "exported")


@BOTH
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_compiles_stocks_code(made):
    stock, fused = pair(made)
    first, second = torch.jit.script(stock), torch.jit.script(fused)
    for (name, a), (_, b) in zip(first.named_modules(), second.named_modules(), strict=True):
        if hasattr(a, "code"):
            assert a.code == b.code or made == "blocks", name
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(second.parameters(), fused.parameters(), strict=True))
    file = io.BytesIO()
    torch.jit.save(torch.jit.freeze(second), file)
    file.seek(0)
    with torch.no_grad():
        same(torch.jit.load(file)(X), stock(X), "scripted")
        same(fused(X), stock(X), "fused as before")
    second.train(), stock.train()
    torch.manual_seed(0)
    out = second(X)
    torch.manual_seed(0)
    same(out, stock(X), "scripted in training")


def test_torchscript_leaves_the_plans_where_they_are():
    fused = pair("called")[1]
    before = {name: id(m) for name, m in fused.named_modules()}, list(plans(fused))
    torch.jit.script(fused), torch.jit.script(fused.layer2), torch.jit.script(copy.deepcopy(fused))
    assert before == ({name: id(m) for name, m in fused.named_modules()}, list(plans(fused)))
    assert not plans(fused)[""].guards.changed()
    assert not any(key.startswith("__prepare") for m in fr.unfuse(fused).modules() for key in vars(m))


@BOTH
@MODES
@pytest.mark.parametrize("casts", [False, pytest.param(True, marks=pytest.mark.gate)], ids=["fp32", "autocast"])
def test_torchscript_traces_stock(made, mode, casts):
    seen = []
    for model in pair(made, mode):
        with torch.autocast("cpu", torch.bfloat16, enabled=casts, cache_enabled=False):
            traced = torch.jit.trace(model, X, check_trace=False)
        seen.append([node.kind() for node in traced.inlined_graph.nodes()])
    assert seen[0] == seen[1]
    file = io.BytesIO()
    torch.jit.save(torch.jit.freeze(traced.eval()) if not mode else traced, file)
    file.seek(0)
    torch.manual_seed(0)
    with torch.no_grad():
        torch.jit.load(file)(X)


@BOTH
@MODES
def test_symbolic_tracing_gives_stocks_graph(made, mode):
    stock, fused = pair(made, mode)
    graphs = [torch.fx.symbolic_trace(m) for m in (stock, fused)]
    assert nodes(graphs[0].graph) == nodes(graphs[1].graph)
    for mine, theirs in zip(exercise(graphs[1]), exercise(graphs[0]), strict=True):
        compare(mine, theirs, "traced")


def test_a_traced_graph_module_can_be_fused():
    stock, _ = pair("called")
    traced = torch.fx.symbolic_trace(stock)
    fused = fr.fuse(traced)
    assert plans(fused)
    with torch.no_grad():
        for _ in range(2):
            same(fused(X), stock(X), "fused")


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_quantization_prepares_stocks_graph(made):
    """FX mode: observers, calibration and conversion are those of stock."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping = get_default_qconfig_mapping("x86")
    prepared = [prepare_fx(m, mapping, (X,)) for m in pair(made)]
    assert nodes(prepared[0].graph) == nodes(prepared[1].graph)
    with torch.no_grad():
        for model in prepared:
            model(X)
        a, b = (convert_fx(model)(X) for model in prepared)
    assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_eager_quantization_observes_what_it_observes_of_stock():
    from torch.ao.quantization import convert, get_default_qconfig, prepare

    ranges = []
    for model in pair("called"):
        model.qconfig = get_default_qconfig("x86")
        prepare(model, inplace=True)
        with torch.no_grad():
            model(X)
        ranges.append([(name, m.min_val, m.max_val) for name, m in model.named_modules() if hasattr(m, "min_val")])
        convert(model, inplace=True)
        with pytest.raises(NotImplementedError, match="QuantizedCPU"):
            model(X)
    same(ranges[1], ranges[0], "observers")
