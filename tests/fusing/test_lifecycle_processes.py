"""Fused models in forked processes: workers of a data loader, and a model whose memory is shared."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fused_resnet as fr
from fused_resnet.fusing import plans
from tests.fusing.beside import MADE, models, same
from tests.fusing.nets import X


class Features(Dataset):
    """What a model makes of an image, in the worker's process."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    @torch.no_grad()
    def __getitem__(self, i):
        return self.model(X[:1] + i)[0]


@pytest.mark.parametrize("made", MADE)
def test_workers_of_a_data_loader(made):
    stock, fused = (m.eval() for m in models(made))
    found = [next(iter(DataLoader(Features(m), 4, num_workers=1, multiprocessing_context="fork", timeout=60)))
             for m in (fused, stock)]
    same(*found, "features")
    assert not any(plan.broken for plan in plans(fused).values())


def test_another_process_writes_shared_parameters():
    stock, fused = (m.eval().requires_grad_(False).share_memory() for m in models("called"))
    before = fused(X)

    def work(model):
        for p in model.parameters():
            p.mul_(0.5)
        model.layer1.bn1.running_mean.add_(1)

    for model in (stock, fused):
        worker = torch.multiprocessing.get_context("fork").Process(target=work, args=(model,))
        worker.start()
        worker.join(60)
        assert worker.exitcode == 0
    fr.refresh(fused)  # no version counter of this process has moved
    same(fused(X), stock(X), "after the other process wrote")
    assert not torch.allclose(before, fused(X))
