"""The tuner on a GPU: candidates in graphs, the winner in use, nothing measured while a graph is captured."""

import pytest
import torch

import fused_resnet as fr
from fused_resnet import backends, models, tuner
from fused_resnet.fusing import plans
from fused_resnet.ops import conv_bn_act as family
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import conv

FAMILY = family.FAMILY


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_RESNET_CACHE_DIR", str(tmp_path))
    backends.reset()
    yield
    monkeypatch.undo()
    backends.reset()


@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.parametrize("problem", [conv(64, 64, 14, residual=True, n=8), conv(64, 256, 14, 1, n=8)],
                         ids=lambda p: p.id)
def test_every_candidate_is_right_and_the_winner_is_chosen(monkeypatch, problem, benchmark):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    problem = problem._replace(device="cuda", dtype="bf16")
    operands = inputs.make(problem)
    rows = tuner.tune(FAMILY, problem, operands, budget=10.0)
    assert {row["status"] for row in rows} == {"ok"}, rows
    compiled = {"cuda"} if backends.available()["cuda"] is None else set()
    assert {"reference", "cudnn", "triton"} | compiled <= {row["backend"] for row in rows}
    best = next(row for row in rows if row["winner"])
    assert best["ms_p50"] <= rows[0]["ms_p50"] * tuner.NOISE
    choice = backends.choose(FAMILY, problem)
    assert (choice.name, choice.tile, choice.label) == (best["backend"], best["tile"], "tuned")
    result = family.OP(*inputs.arguments(problem, operands))
    assert torch.allclose(result, inputs.stock(problem, operands), atol=0.1)


@torch.no_grad()
def test_a_fused_model_tunes_before_a_capture_and_not_inside():
    net, x = models.cifar_resnet(8).eval().cuda().bfloat16(), torch.randn(4, 3, 32, 32, device="cuda").bfloat16()
    fused = fr.fuse(net, tune=0.5)
    expected = fused(x)
    with tuner.recorded() as met:
        fr.fuse(net)(x)
    assert {backends.choose(*key).label for key in met} == {"tuned"}
    backends.cache().clear()
    backends.reset()
    for seconds in (0.0, 0.5):  # weights are packed before a capture
        for plan in plans(fused).values():
            plan.tune = seconds
        if not seconds:
            fused(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused(x)
    graph.replay()
    assert torch.allclose(captured, expected, atol=0.1)
    assert {backends.choose(*key).label for key in met} <= {"heuristic", "nearest", "shipped"}
