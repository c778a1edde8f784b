"""Two processes over Gloo beside one process with the joint batch; torchrun from the command line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from fused_resnet import models
from fused_resnet import nn as ours
from fused_resnet.bench.stock import plain
from fused_resnet.cli import app, datasets
from fused_resnet.cli.processes import Processes
from fused_resnet.cli.recipe import Recipe
from fused_resnet.cli.work.train import variant

pytestmark = pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="no Gloo")
COUNT = 2
STEPS = 3
EXACT = 1e-10
NETS = {"cifar_resnet8": (lambda: models.cifar_resnet(8, in_channels=1), 1),
        "bottleneck": (lambda: models.cifar_resnet(11, in_channels=1, block=ours.Bottleneck), 1),
        "resnet18": (lambda: models.resnet18(num_classes=10), 3)}


def make(name, process_group=None, recompute=None):
    torch.manual_seed(0)
    net = NETS[name][0]().double().train()
    for module in net.modules():
        if hasattr(type(module), "process_group"):
            module.process_group = process_group
        if hasattr(type(module), "recompute"):
            module.recompute = recompute
    return net


def sample(name, share=(3, 5)):
    """Joint images and labels, and where each process cuts them: shares may differ."""
    torch.manual_seed(1)
    n, channels = sum(share), NETS[name][1]
    return torch.randn(n, channels, 16, 16, dtype=torch.float64), torch.randint(0, 10, (n,)), share


def steps(net, x, labels, scale=1.0):
    """A few steps of SGD on the sum of the losses over the joint batch; what must agree between the processes."""
    sgd, losses, first = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), [], None
    for _ in range(STEPS):
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(net(x), labels, reduction="sum") * scale
        loss.backward()
        losses.append(loss.detach())
        first = first or [p.grad.clone() for p in net.parameters()]
        sgd.step()
    plain_net = net.module if isinstance(net, DistributedDataParallel) else net
    return {"losses": torch.stack(losses), "gradients": first,
            "state": {k: v.clone() for k, v in plain_net.state_dict().items()}}


CASES = [("cifar_resnet8", False), ("cifar_resnet8", True), ("bottleneck", True), ("resnet18", False)]


def work(rank, folder):
    """All that needs two processes: starting them takes longer than what they do."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=COUNT)
    try:
        for name, recompute in CASES:
            x, labels, share = sample(name)
            net = DistributedDataParallel(make(name, distributed.group.WORLD, recompute))
            # DDP takes the mean of the gradients, the joint loss is a mean over all images.
            mine = steps(net, x.split(share)[rank], labels.split(share)[rank], COUNT / len(x))
            torch.save(mine, f"{folder}/{name}-{recompute}-{rank}.pt")
        torch.save(refusals(), f"{folder}/refusals-{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(work, (str(folder),), COUNT)
    return folder


def close(a, b, what):
    worst = float((a.double() - b.double()).abs().max())
    assert worst <= EXACT * max(1.0, float(b.abs().max())), f"{what}: {worst}"


@pytest.mark.parametrize(("name", "recompute"), CASES)
def test_two_processes_equal_one_with_the_joint_batch(two, name, recompute):
    first, second = (torch.load(two / f"{name}-{recompute}-{rank}.pt", weights_only=True) for rank in range(COUNT))
    x, labels, _ = sample(name)
    for one in (make(name, recompute=recompute), plain(make(name))):
        joint = steps(one, x, labels, 1 / len(x))
        close((first["losses"] + second["losses"]) / COUNT, joint["losses"], "losses")
        for i, gradient in enumerate(joint["gradients"]):
            close(first["gradients"][i], gradient, f"gradient {i}")
            close(second["gradients"][i], first["gradients"][i], f"gradient {i} of both processes")
        for key, value in joint["state"].items():
            close(first["state"][key], value, key)
            close(second["state"][key], value, key)


def refusals():
    """What modules say that would take statistics of one process alone."""
    x, said = torch.randn(2, 4, 6, 6), {}
    hooked, preact = ours.BasicBlock(4, 4), ours.PreActBlock(4, 4)
    for block in (hooked, preact):
        block.process_group = distributed.group.WORLD
    hooked.bn1.register_forward_hook(lambda *a: None)
    for name, block in (("hooked", hooked), ("preact", preact), (
            "stock", nn.SyncBatchNorm.convert_sync_batchnorm(ours.BasicBlock(4, 4)))):
        try:
            block(x)
        except (ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    with torch.no_grad():
        said["eval"] = tuple(hooked.eval()(x).shape)
    return said


def test_statistics_of_one_process_never_pass_for_joint_ones(two):
    for rank in range(COUNT):
        said = torch.load(two / f"refusals-{rank}.pt", weights_only=True)
        for name in ("hooked", "preact"):
            assert said[name].startswith("ValueError: process_group: this BatchNorm2d cannot take its statistics over")
        assert "SyncBatchNorm expected input tensor to be on GPU" in said["stock"]
        assert said["eval"] == (2, 4, 6, 6)


SMALL = ["--data", "digits", "--size", "8", "--limit", "128", "--depth", "8", "--epochs", "2"]


def torchrun(folder, count, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m",
               "fused_resnet", "train", *SMALL, "--out", str(folder), *arguments]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.mark.gate
def test_torchrun_takes_the_steps_of_one_process_with_the_joint_batch(tmp_path):
    both = torchrun(tmp_path / "two", 2, "--batch", "8", "--sync-bn")
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("accuracy, held out") == 1, "one process prints"
    assert app.run(["train", *SMALL, "--batch", "16", "--out", str(tmp_path / "one")]) == 0
    two, one = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("two", "one"))
    assert two["recipe"]["processes"] == 2 and len(two["curves"]["fused"]["loss"]) == 16
    assert two["curves"]["fused"]["loss"] == pytest.approx(one["curves"]["fused"]["loss"], rel=2e-3)


def test_torchrun_says_a_mistake_once(tmp_path):
    done = torchrun(tmp_path, 2, "--batch", "100")
    assert done.returncode != 0
    assert done.stderr.count("a step takes 200 images (--batch 100 x --accumulate 1 x 2 processes)") == 1, done.stderr


def test_stock_norms_on_a_cpu_are_not_taken_for_joint_ones():
    recipe = Recipe(depth=8, sync_bn=True, processes=2)
    with pytest.raises(ValueError, match="--sync-bn on a CPU needs blocks of fused_resnet"):
        variant(recipe, datasets.load("digits", 8), "stock", Processes(0, 2, "cpu"))
