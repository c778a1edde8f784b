"""kernels/cuda: what reaches the raw operators. Their CPU kernels have the same schema and stand in for the GPU's."""

import re
from types import SimpleNamespace

import pytest
import torch

from fused_resnet import native
from fused_resnet.kernels.cuda import bn_act, bn_act_grad, bn_act_sums, conv_bn_act, stem
from fused_resnet.problem import ConvOperands
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import CATALOGUE, STEMS, conv
from tests.csrc.conftest import library, setup_script  # noqa: F401 - fixtures
from tests.kernels import training
from tests.kernels.judge import agree
from tests.kernels.test_triton_stem import agree as agree_stem
from tests.kernels.training import norm, norm_operands

NORMS = {bn_act: training.agree_forward, bn_act_sums: training.agree_sums, bn_act_grad: training.agree_grad}
SIZES = [norm(8, 5, shortcut="norm"), norm(3, 7, activation="identity"), norm(20, 3, activation="relu6",
         shortcut="tensor"), norm(64, (2, 3), n=3)]
compiled = pytest.mark.usefixtures("library")


@compiled
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("problem", CATALOGUE, ids=lambda p: p.id)
def test_convolutions(problem, dtype):
    problem = problem._replace(dtype=dtype)
    operands = inputs.make(problem)._replace(eps=0.25, pre_eps=0.5)
    agree(problem, operands, conv_bn_act.forward(problem, operands))


@compiled
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("problem", STEMS, ids=lambda p: p.id)
def test_stems(problem, dtype):
    problem = problem._replace(dtype=dtype)
    operands = inputs.make(problem)._replace(eps=0.25)
    operands = operands._replace(x=operands.x.contiguous())  # any strides
    agree_stem(problem, operands, stem.forward(problem, operands))


@compiled
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("problem", SIZES, ids=lambda p: p.id)
@pytest.mark.parametrize("kernel", NORMS, ids=lambda kernel: kernel.__name__.rpartition(".")[2])
def test_norms(kernel, problem, dtype):
    problem = problem._replace(dtype=dtype)
    operands = norm_operands(problem)
    NORMS[kernel](problem, operands, training.run(kernel.forward, problem, operands))


@compiled
def test_vectors_in_16_bits_are_widened_and_follow_the_live_ones():
    problem = conv(16, 24, 5, bias=True, residual=True, prologue="relu")._replace(dtype="bf16")
    operands = inputs.make(problem)
    names = ("bias", "gamma", "beta", "mean", "var", "pre_gamma", "pre_beta", "pre_mean", "pre_var")
    operands = operands._replace(**{name: getattr(operands, name).bfloat16() for name in names})
    for _ in range(2):
        agree(problem, operands, conv_bn_act.forward(problem, operands))
        operands.gamma.neg_()
        operands.pre_mean.add_(0.5)


@pytest.fixture
def seen(monkeypatch):
    """What reaches the operator: (operands, tile) of every call."""
    calls = []

    def operator(*given):
        calls.append((ConvOperands(*given[:14]), given[-1]))

    monkeypatch.setattr(torch.ops.fused_resnet, "_conv_bn_act", SimpleNamespace(default=operator), raising=False)
    return calls


def test_what_the_kernels_can_read_is_handed_on_as_it_is(seen):
    problem = conv(16, 24, 5, 1, bias=True, residual=True)._replace(dtype="bf16")
    operands = inputs.make(problem)._replace(bias=torch.zeros(24))
    conv_bn_act.forward(problem, operands)
    (given, tile), = seen
    assert all(a is b for a, b in zip(given, operands, strict=True)) and tile == conv_bn_act.ANY_TILE


def unaligned(w):
    return torch.cat((w.flatten()[:1], w.flatten()))[1:].view(w.shape)


@pytest.mark.parametrize("change", [torch.Tensor.contiguous, torch.Tensor.float, unaligned])
def test_other_weights_are_copied_once(seen, change):
    problem = conv(16, 24, 5)._replace(dtype="bf16")
    operands = inputs.make(problem)
    operands = operands._replace(weight=change(operands.weight))
    for _ in range(2):
        conv_bn_act.forward(problem, operands)
    first, again = (o.weight for o, _ in seen)
    assert first is again and first.dtype is torch.bfloat16 and first.is_contiguous(memory_format=torch.channels_last)
    assert first.data_ptr() % 16 == 0 and torch.equal(first, operands.weight.bfloat16())
    operands.weight.add_(1)
    conv_bn_act.forward(problem, operands)
    assert torch.equal(seen[-1][0].weight, operands.weight.bfloat16())


def test_images_that_begin_between_two_loads_are_copied(seen):
    problem = conv(8, 8, 3)._replace(dtype="bf16")
    operands = inputs.make(problem)
    row = torch.empty(operands.x.numel() + 1, dtype=torch.bfloat16)[1:]
    x = row.view(2, 3, 3, 8).permute(0, 3, 1, 2).copy_(operands.x)
    assert x.data_ptr() % 16
    tile = conv_bn_act.Tile.named(native.CONV_TILES[0])
    conv_bn_act.forward(problem._replace(residual=True), operands._replace(x=x, residual=x), tile)
    for given in (seen[0][0].x, seen[0][0].residual):
        assert given.data_ptr() % 16 == 0 and given.stride() == x.stride() and torch.equal(given, operands.x)
    conv_bn_act.forward(problem, operands._replace(x=x))  # the rule takes it as it is
    assert seen[1][0].x is x


def test_a_tile_is_handed_on_by_its_place_in_the_table(seen):
    problem = conv(16, 24, 5)._replace(dtype="bf16")
    for place, name in enumerate(native.CONV_TILES):
        tile = conv_bn_act.Tile.named(name)
        assert str(tile) == name
        conv_bn_act.with_tile(vars(tile))(problem, inputs.make(problem))
        assert seen[-1][1] == place
    with pytest.raises(ValueError, match="mma_3x5"):
        conv_bn_act.with_tile({"kernel": "mma", "BLOCK_M": 3, "BLOCK_N": 5})(problem, inputs.make(problem))


def on_gpu(*sizes, dtype="bf16", **flags):
    return conv(*sizes, **flags)._replace(device="cuda", dtype=dtype)


@pytest.mark.parametrize(("change", "expected"), [
    ({}, {"mma_128x64", "mma_128x128", "sm90_128x64", "sm90_128x128", "sm90_256x128"}),
    ({"K": 64}, {"mma_128x64", "sm90_128x64"}), ({"K": 36}, {"mma_128x64"}), ({"K": 32}, {"None"}),
    ({"dtype": "fp32"}, {"mma_128x64"}), ({"dtype": "tf32"}, {"mma_128x64"}), ({"prologue": "relu"}, {"mma_128x64"}),
    ({"C": 60}, {"mma_128x64"}), ({"groups": 2}, {"mma_128x64", "mma_128x128"}), ({"groups": 64}, {"None"}),
    ({"stride": (9, 1)}, {"mma_128x64", "mma_128x128"}), ({"R": 1, "dilation": (300, 1)}, None),
    ({"dilation": (200, 1), "padding": (200, 1)}, {"mma_128x64", "mma_128x128"}),
    ({"N": 2**24}, {"mma_128x64", "mma_128x128"})],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value))
def test_candidates_fit_the_problem_and_the_gpu(there, change, expected):
    problem = on_gpu(64, 256, 56)._replace(**change)
    expected = expected or set(native.CONV_TILES)
    assert {str(tile) for tile in conv_bn_act.candidates(problem, 90)} == expected
    for arch in (80, 86, 89, 120):
        assert {str(t) for t in conv_bn_act.candidates(problem, arch)} == {t for t in expected if "sm90" not in t}


def test_what_was_left_out_of_the_library_is_no_candidate(there, monkeypatch):
    assert str(conv_bn_act.candidates(on_gpu(64, 256, 56), 90)[0]).startswith("sm90")  # the most promising
    monkeypatch.setattr(native, "without_sm90", lambda: "there was no nvidia-cutlass")
    assert {str(t) for t in conv_bn_act.candidates(on_gpu(64, 256, 56), 90)} == {"mma_128x64", "mma_128x128"}


@pytest.fixture
def there(monkeypatch):
    """The CUDA part is there, with all its kernels."""
    monkeypatch.setattr(native, "missing", lambda part: None)
    monkeypatch.setattr(native, "without_sm90", lambda: None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: key == "CUDA")


@pytest.mark.parametrize(("change", "word"), [
    ({"device": "cpu"}, "on cpu"), ({"dtype": "fp64"}, "fp64"), ({"activation": "tanh"}, "tanh"),
    ({"N": 2**30}, "2.30")], ids=str)
def test_what_a_convolution_is_refused_for(there, change, word):
    problem = on_gpu(64, 64, 14)
    assert conv_bn_act.refuse(problem) is None
    assert re.search(word, conv_bn_act.refuse(problem._replace(**change)))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_a_stem_is_refused_for(there, monkeypatch, dtype):
    problem = STEMS[0]._replace(device="cuda", dtype=dtype)
    large = problem._replace(R=31, S=31, stride=(4, 4))
    for arch in (80, 86, 90):
        monkeypatch.setattr(stem, "capability", lambda arch=arch: arch)
        assert stem.refuse(problem) is None and "shared memory" in stem.refuse(large)
    assert all(stem.refuse(p._replace(device="cuda", dtype=dtype)) is None for p in STEMS)
    assert "up to 4 channels" in stem.refuse(problem._replace(C=5))
    assert "on cpu" in stem.refuse(problem._replace(device="cpu")) and "fp64" in stem.refuse(
        problem._replace(dtype="fp64"))


@pytest.mark.parametrize("kernel", NORMS, ids=lambda kernel: kernel.__name__.rpartition(".")[2])
def test_what_a_norm_is_refused_for(there, kernel):
    problem = norm(64, 14, device="cuda", dtype="bf16", shortcut="norm")
    assert kernel.refuse(problem) is None and not kernel.FOLDED and not kernel.needs_finite(problem)
    assert "on cpu" in kernel.refuse(problem._replace(device="cpu"))
    assert "silu" in kernel.refuse(problem._replace(activation="silu"))
    assert "2^20" in kernel.refuse(problem._replace(C=2**20))


def test_without_the_library_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda part: "nvcc was not found while building")
    for kernel, problem in ((conv_bn_act, on_gpu(64, 64, 14)), (bn_act, norm(8, 3, device="cuda"))):
        assert kernel.refuse(problem) == "the native library's CUDA part: nvcc was not found while building"


def test_an_operator_without_a_kernel_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda part: None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: "stem" not in name)
    assert bn_act.refuse(norm(8, 3, device="cuda")) is None
    assert stem.refuse(on_gpu(3, 64, 9, 7, stride=2)).endswith("CUDA part has no kernel of the family stem")
