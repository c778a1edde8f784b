"""What the other tests rely on to see missing and stray writes."""

import subprocess
import sys

import pytest
import torch

from fused_resnet.testing.memory import guarded, poisoned


def nhwc():
    return torch.empty(2, 3, 4, 5, memory_format=torch.channels_last)


def test_poison_shows_what_was_not_written(poison):
    assert nhwc().isnan().all() and torch.empty_like(torch.zeros(3)).isnan().all()


def test_poison_ends_with_its_block():
    with poisoned():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("element", [-1, 2 * 3 * 4 * 5])
def test_guards_see_a_write_one_element_outside(element):
    with guarded() as guards:
        y = nhwc()
        y.fill_(1)
        assert guards.touched() == 0 and y.is_contiguous(memory_format=torch.channels_last)
        y.as_strided((1,), (1,), y.storage_offset() + element).fill_(0)
    assert guards.touched() == 1
    assert nhwc().storage_offset() == 0, "torch.empty was not put back"


def test_a_guarded_copy_keeps_values_and_strides():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    with guarded() as guards:
        copy = guards.copy(x)
    assert torch.equal(copy, x) and copy.stride() == x.stride()


def test_torchvision_imports_behind_the_shim():
    pytest.importorskip("torchvision")
    code = "from fused_resnet.testing.shim import torchvision_shim; torchvision_shim(); torchvision_shim(); " \
           "import torchvision; torchvision.models.resnet18()"
    subprocess.run([sys.executable, "-c", code], check=True)
