"""`fused-resnet env`: everything that a bug report needs."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Annotated

import typer

from fused_resnet import __version__
from fused_resnet.cli import options

if TYPE_CHECKING:
    from fused_resnet.tuning import Cache

SETTINGS = ("BACKEND", "DISABLE", "SELF_CHECK", "CACHE_DIR", "SKIP_LOADING")


def env(
    as_json: options.AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="leave out what is not there or not set")] = False,
) -> None:
    """Prints versions, processor, backends, providers and caches; paste it into a bug report."""
    from fused_resnet.cli import console

    gathered = gather()
    if quiet:
        gathered = {section: {key: value for key, value in values.items() if value is not None}
                    for section, values in gathered.items()}
    if as_json:
        console.emit(gathered)
        return
    for section, values in gathered.items():
        console.out.print(f"[bold]{section}[/bold]")
        for key, value in values.items():
            text = " ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)
            console.out.print(f"  {key:24} {text}", markup=False, soft_wrap=True)


def gather() -> dict[str, dict[str, object]]:
    """The report as sections of key and value."""
    import torch

    from fused_resnet import backends, native
    from fused_resnet.bench import providers, results

    machine = results.describe_environment()
    packages = machine.pop("packages")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = {name: provider.reason(device, "fp32") for name, provider in providers.PROVIDERS.items()}
    cache = backends.cache()
    return {
        "fused_resnet": {"version": __version__, "commit": results.commit() or None,
                         "machine": platform.machine(), "results folder": results.machine_slug()},
        "environment": machine,
        "packages": packages,
        "backends": {name: reason or "available" for name, reason in backends.available().items()},
        "native library": {part: native.missing(part) or str(native.path_of(part)) for part in native.PARTS},
        "providers": {name: reason or "available" for name, reason in reasons.items()},
        "settings": {f"FUSED_RESNET_{name}": backends.setting(name) or None for name in SETTINGS},
        "cache": {"file": str(cache.path), "state": _state(cache)},
    }


def _state(cache: Cache) -> str:
    try:
        return f"{len(cache.read())} entries"
    except ValueError as error:
        return str(error)
