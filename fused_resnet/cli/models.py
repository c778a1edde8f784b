"""What `--model` and `--weights` name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_resnet import models
from fused_resnet.bench.stock import plain
from fused_resnet.cli.words import MODELS, SOURCES, ZOOS
from fused_resnet.testing.shim import torchvision_shim


def resolve(spec: str, seed: int = 0) -> tuple[str, nn.Module]:
    """Builds the stock model that `spec` names, with random weights.

    Returns:
        (bare name, model in eval mode, fp32, on the CPU). Models of ours come with plain forwards.

    Raises:
        ValueError: no such model, its package is missing, or its factory fails.
    """
    torch.manual_seed(seed)
    source, _, name = spec.rpartition(":")
    if not source:
        return _ours(spec)
    if source in ZOOS:
        model = _from_zoo(source, name)
    elif source.endswith(".py"):
        model = _file(Path(source), name)
    else:
        raise ValueError(f"cannot read the model {spec!r}: expected {SOURCES}")
    return name, model.float().eval()


def _ours(name: str) -> tuple[str, nn.Module]:
    cifar = re.fullmatch(r"cifar_resnet(\d+)", name)
    if cifar:
        return name, plain(models.cifar_resnet(int(cifar.group(1)))).eval()
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{_near(name, MODELS)}: expected {SOURCES}; ours are "
                         f"{', '.join(MODELS)}")
    return name, plain(getattr(models, name)()).eval()


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {close[0]!r}" if close else ""


def _zoo(source: str) -> Any:
    """The module of a model zoo, with `list_models`.

    Raises:
        ValueError: it is not installed, or does not fit this torch.
    """
    torchvision_shim()
    try:
        return importlib.import_module(ZOOS[source])
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"{source}:NAME needs a {source} that fits this torch: {error}") from error


def zoo(source: str) -> list[str]:
    """Names of the models of "torchvision" or "timm".

    Raises:
        ValueError: it is not installed, or does not fit this torch.
    """
    return list(_zoo(source).list_models())


def _from_zoo(source: str, name: str) -> nn.Module:
    names = zoo(source)
    if name not in names:
        raise ValueError(f"{source} has no model {name!r}{_near(name, names)}")
    home = _zoo(source)
    return home.create_model(name) if source == "timm" else home.get_model(name)


def _file(path: Path, name: str) -> nn.Module:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"importing {path} failed: {type(error).__name__}: {error}") from error
    factory: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(factory):
        names = [n for n, f in vars(module).items() if inspect.isfunction(f) or inspect.isclass(f)]
        raise ValueError(f"{path} has no callable {name!r}{_near(name, names)}")
    try:
        model = factory()
    except Exception as error:
        raise ValueError(f"{name}() of {path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}() of {path} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """A state dict, plain or inside a checkpoint, on the CPU.

    Raises:
        ValueError: the file cannot be read, or holds no state dict.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read weights from {file}: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{file} holds no state dict")
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_weights(model: nn.Module, file: Path, *, besides: str | None = None) -> None:
    """Loads a state dict, plain or inside a checkpoint, into `model`.

    Args:
        besides: name of a module that keeps its own weights where the file's have other shapes: a new classifier.

    Raises:
        ValueError: the file cannot be read, holds no state dict, or its keys or shapes do not fit.
    """
    state, own = read_weights(file), model.state_dict()
    if besides is not None:
        kept = {key for key in own if key.startswith(f"{besides}.")}
        if any(key not in state or state[key].shape != own[key].shape for key in kept):
            state = {key: value for key, value in state.items() if not key.startswith(f"{besides}.")}
            state |= {key: own[key] for key in kept}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the model: {' '.join(str(error).split())[:300]}") from error
