"""Fine-tuning with a fused model: real digits, a frozen stem, stock and fused from the same start.

    python examples/finetune.py [--steps 40] [--batch 64]

A small ResNet learns the digits 0 to 4, then gets a new classifier and learns 5 to 9 from a hundred pictures, once with
the stock modules and once fused with `recompute=True`, which saves memory in training. scikit-learn brings the data.
`fused-resnet train` does the same for your own pictures, with augmentation, schedules and checkpoints.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import fused_resnet as fr


def digits(wanted: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of these digits, [n, 1, 16, 16] in -1 .. 1, and their classes, which begin at 0."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    chosen = (y >= wanted.start) & (y < wanted.stop)
    return F.interpolate(x[chosen] / 8 - 1, scale_factor=2.0), y[chosen] - wanted.start


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, batch: int) -> float:
    """The loss of the last step."""
    chance = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=chance)
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def kept_for_backward(model: nn.Module, x: torch.Tensor) -> float:
    """KiB that autograd keeps of one forward, parameters left out."""
    known, kept = {p.data_ptr() for p in model.parameters()}, {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.train()(x)
    return sum(kept.values()) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="of each training")
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = fr.models.cifar_resnet(8, num_classes=5, in_channels=1)
    train(model, *digits(range(0, 5)), options.steps, options.batch)
    print(f"0 to 4, learned from scratch: {accuracy(model, *digits(range(0, 5))):.1%} right")

    # A new classifier for five other digits; what recognises strokes stays as it is.
    x, y = digits(range(5, 10))
    model.fc = nn.Linear(model.fc.in_features, 5)
    for module in (model.conv1, model.bn1, model.layer1):
        module.requires_grad_(False)
    print(f"5 to 9, before fine-tuning: {accuracy(model, x[100:], y[100:]):.1%} right")
    fused = fr.fuse(model, recompute=True)  # a copy: both start from the same parameters
    stock = fr.unfuse(copy.deepcopy(model))
    for name, network in (("stock", stock), ("fused", fused)):
        loss = train(network, x[:100], y[:100], options.steps, options.batch)
        print(f"5 to 9, {name}: {accuracy(network, x[100:], y[100:]):.1%} right, last loss {loss:.6f}")

    pairs = list(zip(stock.parameters(), fused.parameters(), strict=True))
    apart = max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)
    print(f"after {options.steps} steps the parameters differ by at most {apart:.1e}")
    sizes = [kept_for_backward(network, x[:64]) for network in (stock, fused)]
    print(f"kept for backward: {sizes[0]:.0f} KiB stock, {sizes[1]:.0f} KiB fused")


if __name__ == "__main__":
    main()
