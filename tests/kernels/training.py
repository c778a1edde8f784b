"""Operands of the training families, and how what their kernels return is judged: against the references in fp64."""

import contextlib

import torch

from fused_resnet import backends, numerics
from fused_resnet.ops import bits, bn_act, conv_bn_stats
from fused_resnet.ops.bn_act import NormOperands
from fused_resnet.problem import NormProblem
from fused_resnet.testing import inputs
from fused_resnet.testing.memory import guarded

EPS = 2.0**-24
# How many roundings an addend of a sum goes through at most in these tests: its own arithmetic, a chain, a tree.
ROUNDINGS = 48
FILLED = 0b10100101  # what stands around a mask


def norm(c, size, *, n=2, activation="relu", shortcut="", dtype="fp32", device="cpu"):
    """A problem of the families bn_act*."""
    return NormProblem(device, dtype, n, *((size, size) if isinstance(size, int) else size), c, activation, shortcut)


def norm_operands(problem, seed=0, mean=0.0):
    """Random operands for forward and backward: channels have the mean `mean`, and z its scale about 1."""
    generator = torch.Generator().manual_seed(seed)
    dtype, c = numerics.DTYPES[problem.dtype], problem.C

    def image(offset=0.0):
        values = torch.randn(problem.output_shape, generator=generator) + offset
        return values.to(problem.device, dtype).contiguous(memory_format=torch.channels_last)

    def vector(low, high, *shape):
        return (torch.rand(*shape, c, generator=generator) * (high - low) + low).to(problem.device)

    def channel():
        return [vector(-1.5, 1.5), vector(-1.0, 1.0), vector(mean - 0.5, mean + 0.5), vector(0.5, 2.0)]

    parts = dict(zip(("gamma", "beta", "mean", "var"), channel(), strict=True))
    if problem.shortcut:
        parts["residual"] = image(mean if problem.shortcut == "norm" else 0.0)
    if problem.shortcut == "norm":
        parts |= zip(("r_gamma", "r_beta", "r_mean", "r_var"), channel(), strict=True)
        parts["r_means"] = vector(-0.3, 0.3, 2)
    if problem.activation != "identity":
        flags = torch.randint(0, 2, (problem.N, problem.H, problem.W, c), generator=generator).bool()
        parts["mask"] = bits.pack(flags).to(problem.device)
    return NormOperands(image(mean), **parts, dy=image(), means=vector(-0.3, 0.3, 2), eps=0.25, r_eps=0.5)


@contextlib.contextmanager
def guarded_masks():
    """Inside, uint8 tensors from torch.empty stand between bytes of FILLED; what was written there is an error."""
    original, bands = torch.empty, []

    def make(*args, **kwargs):
        if kwargs.get("dtype") != torch.uint8:
            return original(*args, **kwargs)
        size = torch.Size(args[0] if isinstance(args[0], tuple) else args).numel()
        buffer = torch.full((size + 2048,), FILLED, dtype=torch.uint8, device=kwargs.get("device"))
        bands.extend((buffer[:1024], buffer[1024 + size:]))
        return buffer[1024:1024 + size]

    torch.empty = make
    try:
        yield
    finally:
        torch.empty = original
    assert all((band == FILLED).all() for band in bands), "bytes outside of the mask were written"


def run(forward, problem, operands):
    """Runs `forward` with every tensor between guard bands and what it allocates full of NaN."""
    with guarded() as guards, guarded_masks():
        fenced = {name: guards.copy(value) for name, value in operands._asdict().items()
                  if isinstance(value, torch.Tensor) and value.is_floating_point()}
        result = forward(problem, operands._replace(**fenced))
        assert guards.touched() == 0, f"{problem.id}: elements outside of the tensors were written"
    return result


def agree_image(problem, result, stock, exact):
    """An image against the reference and the reference in fp64: each element is a handful of operations."""
    assert result.dtype == stock.dtype and result.shape == stock.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    bound = numerics.check(result, stock, exact, dtype=problem.dtype, depth=4)
    assert bound.ok, f"{problem.id}: {bound}"
    assert torch.equal(result.isnan(), stock.isnan()), f"{problem.id}: NaN in other places"


def agree_vector(problem, result, exact, allowed):
    """A vector against fp64, each channel within its own bound; NaN where fp64 has it."""
    assert result.dtype == torch.float32 and result.shape == exact.shape
    assert torch.equal(result.isfinite(), exact.isfinite()), f"{problem.id}: not finite in other channels"
    error = (result.double() - exact).abs()
    worst = (error / allowed)[exact.isfinite()]
    assert (worst <= 1).all(), f"{problem.id}: {worst.max().item():.3g} times the error that is allowed"


def agree_forward(problem, operands, result):
    y, mask = result
    stock, exact = bn_act.forward(problem, operands), bn_act.forward(problem, backends.widen(operands))
    agree_image(problem, y, stock[0], exact[0])
    if problem.activation == "identity":
        assert mask is None
        return
    assert mask.shape == exact[1].shape and mask.dtype == torch.uint8
    if problem.shortcut == "" and operands.x.numel() % 8:
        assert int(mask[-1]) >> operands.x.numel() % 8 == 0, f"{problem.id}: bits behind the last element"
    z = bn_act.forward(problem._replace(activation="identity"), backends.widen(operands))[0]
    near = (z.abs() < 1e-3) | ((z - 6).abs() < 1e-3)  # rounding may decide
    differ = bits.unpack(mask, y) != bits.unpack(exact[1], y)
    assert not (differ & ~near).any(), f"{problem.id}: {int((differ & ~near).sum())} wrong bits"


def agree_sums(problem, operands, result):
    wide = backends.widen(operands)
    dz, terms = bn_act.masked(wide), [torch.ones((), dtype=torch.float64, device=wide.x.device),
                                      bn_act.normalised(wide.x, wide.mean, wide.var, wide.eps)]
    if problem.shortcut == "norm":
        terms.append(bn_act.normalised(wide.residual, wide.r_mean, wide.r_var, wide.r_eps))
    size = torch.stack([(dz * t).abs().sum((0, 2, 3)) for t in terms])
    agree_vector(problem, result, bn_act.sums(problem, wide), ROUNDINGS * EPS * size + 1e-30)


def agree_grad(problem, operands, result):
    stock, exact = bn_act.grad(problem, operands), bn_act.grad(problem, backends.widen(operands))
    for mine, theirs, wide in zip(result, stock, exact, strict=True):
        if theirs is None:
            assert mine is None
        else:
            agree_image(problem, mine, theirs, wide)


def agree_stats(problem, operands, result):
    """u as any convolution; its statistics against those of the stored u in fp64."""
    u, mean, var = result
    stock = conv_bn_stats.reference(problem, operands)[0]
    exact = conv_bn_stats.reference(problem, backends.widen(operands))[0]
    assert u.dtype == operands.x.dtype and u.is_contiguous(memory_format=torch.channels_last)
    bound = numerics.check(u, stock, exact, dtype=problem.dtype, depth=problem.depth)
    assert bound.ok, f"{problem.id}: {bound}"
    wide = u.double()
    var64, mean64 = torch.var_mean(wide, (0, 2, 3), correction=0)
    agree_vector(problem, mean, mean64, ROUNDINGS * EPS * wide.abs().mean((0, 2, 3)) + 1e-30)
    # A tile's mean is rounded where it stands beside the pivot; joined with the others it brings that error into var.
    far = (mean64 - (0.0 if operands.mean is None else operands.mean.double())).abs() + var64.sqrt()
    agree_vector(problem, var, var64, ROUNDINGS * EPS * var64 + 4 * EPS * far * var64.sqrt() + (4 * EPS * far) ** 2)


def stats_problem(problem):
    """A problem of the catalogue as one of the family conv_bn_stats."""
    return problem._replace(norm=False, residual=False, activation="identity")


def stats_operands(problem, seed=0):
    return inputs.make(problem, seed)._replace(pre_eps=0.5)
