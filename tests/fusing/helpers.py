"""Stock beside fused: the comparisons that every test of fuse() makes."""

import copy
import io
import pickle

import torch
from torch.utils._pytree import tree_leaves

import fused_resnet as fr
from fused_resnet import numerics
from fused_resnet.fusing import plans


def counts(model):
    """(fused, all) convolutions of a fused model."""
    report = fr.report(model)
    return report.fused, len(report)


def same_strides(result, expected):
    mine, theirs = tree_leaves(result), tree_leaves(expected)
    assert type(result) is type(expected) and len(mine) == len(theirs)
    for a, b in zip(mine, theirs):
        if isinstance(b, torch.Tensor):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def agree(stock, fused, *inputs):
    """Both models on copies of the inputs: close, equal in type, strides and dtype, inputs left in the same state."""
    first, second = copy.deepcopy(inputs), copy.deepcopy(inputs)
    expected, result = stock(*first), fused(*second)
    same_strides(result, expected)
    for a, b in zip(tree_leaves(result), tree_leaves(expected)):
        if isinstance(b, torch.Tensor) and b.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
            limit = 16 * numerics.EPS[numerics.NAMES[b.dtype]]
            assert numerics.measure(a, b).rel <= (2e-5 if b.dtype is torch.float32 else limit), numerics.measure(a, b)
        else:
            assert a is b or (a == b if not isinstance(b, torch.Tensor) else torch.equal(a, b))
    for a, b in zip(first, second):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, equal_nan=True)
    return result


def equal(stock, fused, *inputs):
    """Both models run the same operators: equal bit for bit."""
    expected, result = stock(*copy.deepcopy(inputs)), fused(*copy.deepcopy(inputs))
    same_strides(result, expected)
    for a, b in zip(tree_leaves(result), tree_leaves(expected)):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) if isinstance(b, torch.Tensor) else a == b


def twice(stock, fused, *inputs):
    """`agree` at the first call, which runs stock beside the plan, and at the second, which does not."""
    agree(stock, fused, *inputs)
    agree(stock, fused, *inputs)
    assert not any(plan.broken for plan in plans(fused).values())


def aside(fused):
    """The reasons for which the outermost plan stepped aside."""
    return list(plans(fused)[""].fallbacks)


def both(stock, fused, change):
    """Applies one change to both models."""
    torch.manual_seed(5)
    change(stock)
    torch.manual_seed(5)
    change(fused)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
