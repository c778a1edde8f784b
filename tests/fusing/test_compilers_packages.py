"""Packages that leave Python: inductor's kernels, AOTInductor, ONNX. What is in them is what stock puts in."""

import collections

import pytest
import torch

from tests.fusing.beside import compare, models, observe, same, step
from tests.fusing.nets import X
from tests.fusing.pairs import close

DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=64)},)
BOTH = pytest.mark.parametrize("made", ["called", "blocks"])
MORE = torch.cat([X, X + 1, X])


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch._dynamo.reset()


def pair(made, mode=False):
    return [m.train(mode) for m in models(made)]


@pytest.mark.gate
@BOTH
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_makes_as_many_kernels_as_of_stock(made, mode):
    """Evaluated and trained; reduce-overhead asks for CUDA graphs, which a CPU does without."""
    from torch._inductor import metrics

    kernels, seen = [], []
    for model in pair(made):
        torch._dynamo.reset()
        metrics.reset()
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        with torch.no_grad():
            out = compiled(X)
        compiled.train()
        seen.append((out, observe(compiled, lambda m: step(m, X))))
        kernels.append(metrics.generated_kernel_count)
    assert kernels[0] == kernels[1] > 0
    same(seen[1][0], seen[0][0], "compiled")
    compare(seen[1][1], seen[0][1], "a compiled step")


@pytest.mark.gate
@BOTH
def test_aotinductor_packages(made, tmp_path):
    stock, fused = pair(made)
    with torch.no_grad():
        program = torch.export.export(fused, (X,), dynamic_shapes=DYNAMIC)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "fused.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for x in (X, MORE):
            same(loaded(x), stock(x), "packaged")


def standard_operators(path):
    """How many of each operator an ONNX file holds, all of the standard's own domain."""
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions and {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    return collections.Counter(node.op_type for node in model.graph.node)


@BOTH
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.gate)], ids=["traced", "exported"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_files_are_stocks(made, dynamo, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
        options = {"dynamic_shapes": DYNAMIC}
    else:
        options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    stock, fused = pair(made)
    operators = []
    for name, model in (("stock", stock), ("fused", fused)):
        path = str(tmp_path / f"{name}.onnx")
        torch.onnx.export(model, (X,), path, dynamo=dynamo, verbose=False, **options)
        operators.append(standard_operators(path))
    assert operators[0] == operators[1]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in (X, MORE):
        out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        with torch.no_grad():
            close(torch.from_numpy(out), stock(x), 1e-4, "ONNX Runtime")
