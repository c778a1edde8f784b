"""The operator `stem`: its public function, what tracing sees, and which kernel is chosen."""

import pytest
import torch
import torch.nn.functional as F

import fused_resnet as fr
from fused_resnet import backends, native
from fused_resnet.ops import stem
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import STEMS, conv

PROBLEM = stem.StemProblem(*conv(3, 8, 17, 7, stride=2))


@pytest.fixture
def parts():
    o = inputs.make(PROBLEM)
    return o.x, o.weight, o.gamma, o.beta, o.mean, o.var


def composition(x, weight, gamma, beta, mean, var):
    y = F.batch_norm(F.conv2d(x, weight, None, 2, 3), mean, var, gamma, beta)
    return F.max_pool2d(F.relu(y), 3, 2, 1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_it_is_the_stock_sequence(parts, backend):
    if backends.available()[backend]:
        pytest.skip(backends.available()[backend])
    with torch.no_grad(), backends.use(backend):
        result = fr.functional.stem(*parts)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, composition(*parts))


def test_a_backend_without_this_family_says_so(parts):
    reasons = dict(backends.explain(PROBLEM, "stem"))
    assert reasons["reference"] is None and "no kernel of the family stem" in reasons["cpu"]
    with torch.no_grad():
        torch.testing.assert_close(fr.functional.stem(*parts), composition(*parts))
        with backends.use("cpu"), pytest.raises(ValueError, match="no kernel of the family stem"):
            fr.functional.stem(*parts)


def test_gradients_are_those_of_stock(parts):
    leaves = [part.clone().requires_grad_() if i < 4 else part for i, part in enumerate(parts)]
    ours = torch.autograd.grad(fr.functional.stem(*leaves).square().sum(), leaves[:4])
    theirs = torch.autograd.grad(composition(*leaves).square().sum(), leaves[:4])
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)


def test_the_operator_is_well_defined(parts):
    x, weight, gamma, beta, mean, var = parts
    torch.library.opcheck(stem.OP, (x, weight, None, gamma, beta, mean, var, 1e-5, "relu", (2, 2), (3, 3)))


def test_mistakes_raise_what_stock_raises(parts):
    x, *_, mean, var = parts
    with pytest.raises(ValueError, match="'mish'"):
        fr.functional.stem(*parts, activation="mish")
    for wrong in ((x[:, :2], *parts[1:]), (x.double(), *parts[1:]), (*parts[:4], mean[:3], var)):
        with pytest.raises(RuntimeError) as ours:
            fr.functional.stem(*wrong)
        with pytest.raises(RuntimeError) as theirs:
            composition(*wrong)
        assert str(ours.value) == str(theirs.value)


def test_a_problem_describes_its_pooled_output():
    for problem in STEMS:
        operands = inputs.make(problem)
        assert stem.reference_of(problem, operands).shape == problem.output_shape
        assert isinstance(problem.layer, stem.StemProblem) and problem.id.endswith("-pool")
    large = stem.StemProblem(*conv(3, 64, 224, 7, n=1, stride=2))._replace(dtype="bf16")
    assert large.output_shape == (1, 64, 56, 56)
    assert large.bytes == 2 * (3 * 224 * 224 + 64 * 147 + 64 * 56 * 56) + 4 * 64 * 4


@pytest.mark.skipif(native.missing("cpu") is not None, reason="the native library is not there")
@pytest.mark.parametrize("shape", [(2, 64, 9, 12), (1, 17, 1, 1), (0, 16, 4, 4), (1, 3, 2, 7), (3, 40, 8, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_pool_is_pytorchs(shape, dtype):
    x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    if x.numel():
        x[0, 0, 0, 0], x[-1, -1, -1, -1], x[0, 1, 0, 0] = float("nan"), float("-inf"), float("inf")
    mine, theirs = stem.pool(x), torch.max_pool2d(x, 3, 2, 1)
    assert torch.equal(mine.isnan(), theirs.isnan()) and torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    assert mine.is_contiguous(memory_format=torch.channels_last)
