"""TensorGuards is no public part of PyTorch: its stand-in notices the same changes."""

import importlib.util

import pytest
import torch
from torch import nn

from fused_resnet.nn import memo

T, U = torch.randn(2, 2, 8, 4, 4)


def _inference():
    with torch.inference_mode():
        return T.clone()


OTHERS = {"same": lambda: T, "values": lambda: T + 1, "dtype": lambda: T.half(), "device": lambda: T.to("meta"),
          "sizes": lambda: T[:1], "rank": lambda: T[0],
          "strides": lambda: T.contiguous(memory_format=torch.channels_last),
          "gap": lambda: torch.zeros(2, 8, 4, 8)[..., ::2], "gradient": lambda: T.clone().requires_grad_(),
          "parameter": lambda: nn.Parameter(T, requires_grad=False), "inference": _inference}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("first", [0, 1])
def test_both_notice_the_same(name, first):
    answers = []
    for kind in (memo.TensorGuards, memo.PlainGuards):
        guards = kind(T, U, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        answers.append(guards.check(*((OTHERS[name](), U) if first else (U, OTHERS[name]()))))
    assert answers == [name in ("same", "values")] * 2


def test_a_call_in_inference_mode_is_another_call():
    for kind in (memo.TensorGuards, memo.PlainGuards):
        guards = kind(T, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        with torch.inference_mode():
            assert not guards.check(T)
        assert guards.check(T)


def test_a_pytorch_without_it_gets_the_stand_in(monkeypatch):
    assert memo.TensorGuards is not memo.PlainGuards
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    spec = importlib.util.spec_from_file_location("memo_without", memo.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TensorGuards is module.PlainGuards
