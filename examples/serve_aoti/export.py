"""Writes what `serve` runs: a package of a lowered network for any batch, an input, and stock's outputs for it.

    python examples/serve_aoti/export.py [--out FOLDER] [--model resnet50] [--size 224] [--batch 8]

The weights are random; load yours where the comment says so.
"""

import argparse
from pathlib import Path

import torch

import fused_resnet as fr


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of model.pt2, input.bin, reference.bin")
    parser.add_argument("--model", default="resnet50", help="a network of fused_resnet.models")
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--batch", type=int, default=8, help="of input.bin; the package takes 1 to 1024")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = getattr(fr.models, args.model)().eval()  # model.load_state_dict(torch.load("weights.pt"))
    x = torch.randn(args.batch, 3, args.size, args.size)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=1024)
        program = fr.lower(torch.export.export(model, (x,), dynamic_shapes=({0: batch},)))
        print(fr.report(program).counted)
        torch._inductor.aoti_compile_and_package(program, package_path=str(args.out / "model.pt2"))
        x.numpy().tofile(args.out / "input.bin")
        model(x).numpy().tofile(args.out / "reference.bin")


if __name__ == "__main__":
    main()
