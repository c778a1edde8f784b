"""Options that several commands take, and the words that a shell completes for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from fused_resnet.bench import providers
from fused_resnet.cli import console, models

CIFAR = tuple(f"cifar_resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110))
ZOOS = ("torchvision:", "timm:")


def _listed(known: Callable[[str], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completes the last word of a comma-separated list."""
    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{word}" for word in known(last) if word.startswith(last)]

    return complete


def model_names(last: str) -> list[str]:
    """Of ours; of a zoo once its prefix is typed, where it is installed."""
    zoo = last.partition(":")[0]
    if f"{zoo}:" not in ZOOS or ":" not in last:
        return [*models.BUILDERS, *CIFAR, *ZOOS]
    with contextlib.suppress(ValueError):
        return [f"{zoo}:{name}" for name in models.zoo(zoo)]
    return []


complete_models = _listed(model_names)
complete_dtypes = _listed(lambda last: console.DTYPES)
complete_providers = _listed(lambda last: providers.PROVIDERS)


def complete_devices(incomplete: str) -> list[str]:
    return [name for name in ("cpu", "cuda") if name.startswith(incomplete)]


def complete_dtype(incomplete: str) -> list[str]:
    """Of a command that takes one; TF32 is no dtype of tensors."""
    return [name for name in console.DTYPES if name.startswith(incomplete) and name != "tf32"]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notes")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout and nothing else; notes go to stderr")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one",
                                            autocompletion=complete_devices)]
Model = Annotated[str, typer.Option(help=models.HELP, autocompletion=complete_models)]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16", autocompletion=complete_dtype)]
Threads = Annotated[int | None, typer.Option(help="PyTorch's thread count")]
