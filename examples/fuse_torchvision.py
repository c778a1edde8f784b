"""A torchvision model: fuse it, see what became of it, check it, time it.

    python examples/fuse_torchvision.py [--model resnet50] [--weights DEFAULT] [--batch 8] [--size 224]

Weights are random unless `--weights` names some of torchvision's, which it then downloads.
"""

import argparse

import torch
import torchvision

import fused_resnet as fr
from fused_resnet import timing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="a name of torchvision.models")
    parser.add_argument("--weights", help="such as DEFAULT; random ones if left out")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="edge of the input in pixels")
    parser.add_argument("--seconds", type=float, default=4, help="for the timing")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.get_model(options.model, weights=options.weights).to(device).eval()
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)

    fused = fr.fuse(model)
    with torch.no_grad():
        fused(images)  # the first call compares with the stock model and packs the weights
    report = fr.report(fused)
    print(f"{options.model}: {report.fused} of {len(report)} convolutions fused")
    for row in report:
        if row.status == "skipped":
            print(f"  {row.name} stays as it is: {row.reason}")
    print("against float64:", fr.verify(model, fused, images))

    # Stock at its best: channels_last. Rounds of random order, and the ratio of each round, because machines drift.
    # (`fused-resnet bench` does this for more providers and writes a file; see docs/benchmark-method.md.)
    stock = model.to(memory_format=torch.channels_last)
    given = images.to(memory_format=torch.channels_last)
    calls = {"stock": lambda x: stock(x), "fused": lambda x: fused(x)}
    with torch.no_grad():
        times = timing.measure(calls, {name: [given] for name in calls}, device=device, budget=options.seconds)
    for name, samples in times.items():
        print(f"{name}: {timing.percentiles(samples)[1]:.1f} ms")
    print(f"fused is {timing.paired_ratio(times['stock'], times['fused']):.2f} times as fast here")


if __name__ == "__main__":
    main()
