"""The ways to run a layer, for whoever measures them: their names, which to try first, and a first run by itself."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.layers import kernel
from benchmarks.sheet import failure
from fused_resnet import tuner
from fused_resnet.problem import ConvOperands, ConvProblem

PROVIDERS = {"reference": "eager_channels_last", "cudnn": "fused_cudnn", "cuda": "fused_cuda",
             "triton": "fused_triton"}
PYTORCHS = ("reference", "cudnn", "cpu")  # what PyTorch itself runs: proven as it is
MULTIPROCESSORS = 132
# Products and bytes from L2 a second, for ordering tiles only: no figure is made of them.
PRODUCTS, L2_BYTES = 800e12, 5.5e12


def kind_of(tile: dict[str, Any]) -> str:
    """gather, gather swapped, box, gemm1x1, ws, ... of a tile."""
    name = "gather" if tile["kernel"] == "gemm" else tile["kernel"]
    return name + (" swapped" if tile.get("SWAP") else "") + (" split" if tile.get("SPLIT_K", 1) > 1 else "")


def compiled(problem: ConvProblem, arch: int) -> list[Any]:
    """The native library's tiles that fit `problem`: all are worth measuring, because none has to be compiled."""
    module = kernel("cuda", problem)
    return [tile for tile in module.candidates(problem, arch) if tile] if hasattr(module, "candidates") else []


def expected(problem: ConvProblem, tile: Any) -> float:
    """What a tile's products or its loads would take in whole rounds over the chip: orders tiles of one kind."""
    rows, columns = tile.BLOCK_M, max(16, tile.BLOCK_N)
    pixels, channels = problem.N * problem.P * problem.Q, problem.K // problem.groups
    tiles = -(-pixels // rows) * -(-channels // columns) * problem.groups * tile.SPLIT_K
    depth = problem.depth / tile.SPLIT_K
    products, loads = 2 * rows * columns * depth / PRODUCTS, 2 * (rows + columns) * depth / L2_BYTES
    return -(-tiles // MULTIPROCESSORS) * max(products, loads)


def promising(problem: ConvProblem, tiles: Sequence[Any], most: int | None = None,
              each: int | None = None) -> list[Any]:
    """The first tile, which is the shipped one, then the kinds in turn, each kind's likeliest first.

    Args:
        problem: what they compute.
        tiles: of any kinds.
        most: how many there may be in all.
        each: how many of a kind there may be.
    """
    groups: dict[str, list[Any]] = {}
    for tile in sorted(tiles[1:], key=lambda tile: expected(problem, tile)):
        groups.setdefault(kind_of(asdict(tile)), []).append(tile)
    places = [(place, tile) for group in groups.values() for place, tile in enumerate(group[:each])]
    return [tiles[0], *(tile for _, tile in sorted(places, key=lambda pair: pair[0]))][:most]


def mark(way: tuner.Candidate) -> dict[str, Any]:
    """The fields that name a way in a row."""
    return {"provider": PROVIDERS.get(way.backend, way.backend), "backend": way.backend, "tile": way.tile}


def proven(way: tuner.Candidate, problem: ConvProblem, given: ConvOperands,
           avoid: Sequence[dict[str, Any]]) -> Generator[dict[str, Any], None, bool]:
    """Runs a way once by itself, announced: yields what there is to say, returns whether it may be measured."""
    if way.backend in PYTORCHS:
        return True
    name = mark(way)
    if name in avoid:
        return False
    yield {**name, "status": "started"}
    try:
        way.forward(problem, given)
        if given.x.is_cuda:
            torch.cuda.synchronize()
    except Exception as error:  # whatever a compiler raises; a lost device is met by the process itself
        yield {**name, "status": "failed", "detail": failure(error)}
        return False
    return True
