"""Real photographs as input: scikit-image's bundled pictures, prepared as for ImageNet.

No pretrained weights can be bundled, so a network with random weights is calibrated: its batch norms
take their running statistics from the pictures, which gives every layer the activations of a sane
scale that a trained network has.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

SIZE = 224
RESIZE = 256
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, per channel of pixels in 0 .. 1
STD = (0.229, 0.224, 0.225)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# These lie inside scikit-image's wheel; its other pictures are downloaded on first use.
BUNDLED = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg",
           "camera.png", "coins.png", "ihc.png", "retina.jpg", "moon.png", "grass.png", "gravel.png", "brick.png")


def files(folder: str | Path | None = None) -> list[Path]:
    """The pictures of `folder`, or scikit-image's bundled ones.

    Raises:
        ValueError: the folder holds no picture, or scikit-image is not installed.
    """
    if folder is not None:
        found = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
        return found
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("the bundled pictures need scikit-image: pip install 'fused_resnet[cli]', or name a folder "
                         "of your own pictures")
    found = [path for name in BUNDLED if (path := Path(spec.origin).parent / "data" / name).is_file()]
    if not found:
        raise ValueError(f"scikit-image {spec.origin} holds none of its bundled pictures")
    return found


def load(count: int, *, folder: str | Path | None = None, size: int = SIZE) -> torch.Tensor:
    """Reads `count` pictures: resized, cropped, normalised.

    The shorter side becomes `size * 256 / 224`. The first round of pictures is cropped in the centre; when there are
    fewer than `count`, the later rounds are mirrored and cropped off the centre, so that no two images are equal.

    Returns:
        [count, 3, size, size], fp32, contiguous.

    Raises:
        ValueError: no pictures, or one of them cannot be read.
    """
    paths = files(folder)
    resized = [_read(path, round(size * RESIZE / SIZE)) for path in paths[:count]]
    images = [_crop(resized[i % len(resized)], size, i // len(resized)) for i in range(count)]
    batch = torch.stack(images)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (batch - mean) / std


def read(path: Path, size: int) -> torch.Tensor:
    """One picture, resized and cropped in its centre as `load` does it: [3, size, size] fp32 in 0 .. 1.

    Raises:
        ValueError: it cannot be read.
    """
    return _crop(_read(path, round(size * RESIZE / SIZE)), size, 0)


def _read(path: Path, short: int) -> torch.Tensor:
    """[3, H, W] in 0 .. 1, the shorter side `short`."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from error
    scale = short / min(image.size)
    width, height = (max(short, round(edge * scale)) for edge in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _crop(image: torch.Tensor, size: int, variant: int) -> torch.Tensor:
    """The centre for variant 0, else a place that the variant decides; odd variants are mirrored."""
    slack = [edge - size for edge in image.shape[1:]]
    top, left = ((s // 2 + variant * step) % (s + 1) for s, step in zip(slack, (5, 11)))
    crop = image[:, top:top + size, left:left + size]
    return crop.flip(2) if variant % 2 else crop


def batches(pictures: torch.Tensor, batch: int, count: int) -> list[torch.Tensor]:
    """`count` batches out of the pictures, each beginning one picture further and going round."""
    total = len(pictures)
    return [pictures[[(start + i) % total for i in range(batch)]] for start in range(count)]


@torch.no_grad()
def calibrate(model: nn.Module, pictures: torch.Tensor, *, say: Callable[[str], None] | None = None) -> nn.Module:
    """Sets the running statistics of every batch norm to those of the pictures, in place.

    One pass in train mode with a cumulative average; modes and momenta are put back afterwards. Parameters are
    not touched.

    Args:
        model: any module; one without batch norms is returned as it is.
        pictures: [N, 3, H, W] in the model's dtype and device, N * H * W > 1 in every norm.
        say: receives one sentence about what was done.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes = {m: m.training for m in model.modules()}
    momenta = [m.momentum for m in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for chunk in pictures.split(8):
            model(chunk)
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    if say is not None:
        say(f"no pretrained weights are bundled: random weights, {len(norms)} batch norms calibrated on "
            f"{len(pictures)} pictures")
    return model
