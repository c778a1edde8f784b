"""Options that several commands take, and how a shell completes them: as `words`, without torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from fused_resnet.cli import words


def _one(known: Callable[[str], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completes a word."""
    def complete(incomplete: str) -> list[str]:
        return [word for word in known(incomplete) if word.startswith(incomplete)]

    return complete


def _listed(known: Callable[[str], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completes the last word of a comma-separated list."""
    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{word}" for word in known(last) if word.startswith(last)]

    return complete


def model_names(last: str) -> list[str]:
    """Of ours; of a zoo once its prefix is typed, where it is installed: that loads the zoo, and torch with it."""
    zoo, colon, _ = last.partition(":")
    if not colon or zoo not in words.ZOOS:
        return [*words.MODELS, *words.CIFAR, *(f"{prefix}:" for prefix in words.ZOOS)]
    from fused_resnet.cli import models

    with contextlib.suppress(ValueError):
        return [f"{zoo}:{name}" for name in models.zoo(zoo)]
    return []


complete_model = _one(model_names)
complete_models = _listed(model_names)
complete_device = _one(lambda last: words.DEVICES)
complete_dtype = _one(lambda last: words.TENSORS)
complete_dtypes = _listed(lambda last: words.DTYPES)
complete_benched = _listed(lambda last: words.BENCHED)
complete_providers = _listed(lambda last: words.PROVIDERS)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notes")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout and nothing else; notes go to stderr")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one",
                                            autocompletion=complete_device)]
Model = Annotated[str, typer.Option(help=words.SOURCES, autocompletion=complete_model)]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16", autocompletion=complete_dtype)]
Size = Annotated[int, typer.Option(help="edge of the input in pixels", min=8)]
Threads = Annotated[int | None, typer.Option(help="PyTorch's thread count")]
