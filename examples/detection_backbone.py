"""The backbone of torchvision's Faster R-CNN, a ResNet with a feature pyramid, fused as a whole.

    python examples/detection_backbone.py [--backbone resnet50] [--size 256]

Its norms are FrozenBatchNorm2d, and it returns a dict of five feature maps: `fuse` was not written for this class, it
reads the dataflow. In your detector: `detector.backbone = fr.fuse(detector.backbone)`. The weights here are random.
"""

import argparse

import torch
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import fused_resnet as fr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18", help="a ResNet of torchvision.models")
    parser.add_argument("--size", type=int, default=256, help="edge of the input in pixels")
    options = parser.parse_args()
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name=options.backbone, weights=None, trainable_layers=0).eval()
    image = torch.randn(1, 3, options.size, options.size)

    fused = fr.fuse(backbone)
    with torch.no_grad():
        stock_maps, fused_maps = backbone(image), fused(image)

    print(f"{'level':6} {'shape':20} relative difference to stock")
    for level, expected in stock_maps.items():
        error = (fused_maps[level] - expected).norm() / expected.norm()
        print(f"{level:6} {tuple(expected.shape)!s:20} {error:.1e}")
    report = fr.report(fused)
    print(f"{report.fused} of {len(report)} convolutions fused; the others:")
    for row in report:
        if row.status == "skipped":
            print(f"  {row.name}: {row.reason}")
    print("against float64:", fr.verify(backbone, fused, image))


if __name__ == "__main__":
    main()
