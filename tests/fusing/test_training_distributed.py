"""Fused models in two processes over Gloo: DDP, SyncBatchNorm and FSDP do what they do to stock."""

import copy

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import fused_resnet as fr
from fused_resnet.fusing import plans
from tests.fusing.nets import Net
from tests.fusing.pairs import BRANCH, BRANCHES, X, close, fallbacks, loss_of, nodes, same_state, sgd
from tests.nets import randomize

pytestmark = pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="no Gloo")
COUNT = 2
JOINT = torch.randn(COUNT * 3, *X.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(4))


class Spare(nn.Module):
    """Has parameters that its forward leaves alone."""

    def __init__(self):
        super().__init__()
        self.body, self.spare = Net(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.body(x)


def models(make=Net):
    torch.manual_seed(0)
    stock = randomize(make()).double().train()
    for m in stock.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return stock, fr.fuse(stock, recompute=False)


def share(rank):
    return JOINT.chunk(COUNT)[rank]


def steps(model, x, count=4):
    optimizer = sgd(model)
    for i in range(count):
        optimizer.zero_grad()
        loss_of(model(x + i)).backward()
        if i + 1 < count:
            optimizer.step()


def branches(model, x):
    return nodes(model(x))[BRANCH]


def ddp(rank):
    for make, options in ((Net, {}), (Net, {"static_graph": True}), (Net, {"gradient_as_bucket_view": True}),
                          (Spare, {"find_unused_parameters": True}), (Net, {"broadcast_buffers": False})):
        wrapped = [DistributedDataParallel(m, **options) for m in models(make)]
        for model in wrapped:
            steps(model, share(rank))
        same_state(*wrapped)
        mine = [p.grad.clone() for p in wrapped[1].parameters() if p.grad is not None]
        for gradient in mine:
            other = gradient.clone()
            distributed.broadcast(other, 0)
            assert torch.equal(other, gradient), "processes have one gradient"
        assert branches(wrapped[1], share(rank)) == BRANCHES


def one_process_has_the_joint_gradients(rank):
    """With fixed statistics the mean of the processes' gradients is that of the joint batch."""
    stock, fused = (m.eval() for m in models())
    wrapped = DistributedDataParallel(fused)
    wrapped(share(rank)).square().sum().backward()
    (stock(JOINT).square().sum() / COUNT).backward()
    for (name, p), q in zip(stock.named_parameters(), fused.parameters(), strict=True):
        close(q.grad, p.grad, 1e-10, name)
    assert branches(wrapped, share(rank)) == BRANCHES


def accumulation(rank):
    wrapped = [DistributedDataParallel(m) for m in models()]
    for model in wrapped:
        with model.no_sync():
            loss_of(model(share(rank))).backward()
        loss_of(model(share(rank) + 1)).backward()
    same_state(*wrapped)


def sync_batch_norm(rank):
    """Stock refuses a CPU; so does what was fused, with the same words and the same state."""
    stock, fused = models()
    words = []
    for model in (nn.SyncBatchNorm.convert_sync_batchnorm(stock), nn.SyncBatchNorm.convert_sync_batchnorm(fused),
                  fr.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(stock)), recompute=False)):
        with pytest.raises((ValueError, RuntimeError), match="SyncBatchNorm") as caught:
            model.train()(share(rank))
        words.append(str(caught.value))
        model.eval()
        with torch.no_grad():
            model(share(rank))
    assert len(set(words)) == 1
    # Frozen ones need no group.
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(models()[0]).eval()
    fused = fr.fuse(stock, recompute=False)
    for model in (stock, fused):
        loss_of(model(share(rank))).backward()
    same_state(stock, fused)
    assert branches(fused, share(rank)) == BRANCHES


def fsdp(rank):
    from torch.distributed.fsdp import fully_shard

    def gathered(model):
        return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in model.state_dict().values()]

    for parts in ((), ("layer1", "layer2"), ("layer2.0.conv1",)):
        wrapped = models()
        for model in wrapped:
            for part in parts:
                fully_shard(model.get_submodule(part))
            fully_shard(model)
            steps(model, share(rank))
        for a, b in zip(*map(gathered, wrapped), strict=True):
            close(b, a, 1e-10)
        for p, q in zip(*(m.parameters() for m in wrapped), strict=True):
            close(q.grad.full_tensor(), p.grad.full_tensor(), 1e-10)
        if parts:
            assert "a hook is registered inside" in fallbacks(wrapped[1])[""], fallbacks(wrapped[1])
        assert branches(wrapped[1], share(rank)) == BRANCHES, "what has no hook inside is fused"
        assert not any(plan.broken for plan in plans(wrapped[1]).values())


# Starting processes takes longer than what they do here.
WORK = {"ddp": (ddp, one_process_has_the_joint_gradients, accumulation), "sync_batch_norm": (sync_batch_norm,),
        "fsdp": (fsdp,)}


def run(rank, store, name):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=COUNT)
    try:
        for work in WORK[name]:
            work(rank)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("name", WORK)
def test_two_processes(tmp_path, name):
    multiprocessing.spawn(run, (str(tmp_path / "store"), name), COUNT)
