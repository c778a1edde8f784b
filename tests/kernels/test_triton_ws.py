"""Tiles "ws": the Gluon kernel's own text over a model of its barriers, and its twin in Triton's interpreter."""

import itertools

import numpy as np
import pytest
import torch

from fused_resnet.kernels.triton import conv_bn_act_tma, conv_bn_act_ws, epilogue, window
from fused_resnet.kernels.triton.legal import Tile
from fused_resnet.testing import inputs
from fused_resnet.testing.cases import conv
from tests.kernels import gluon_model

WS, WINDOW = conv_bn_act_ws, window
# Tiles with one step and with many, one tile a program and many, boxes over the border, strides, a lone row of pixels.
PROBLEMS = [conv(4, 8, (5, 6), n=2, residual=True, bias=True), conv(2, 12, (4, 7), 1, n=3, residual=True),
            conv(4, 4, (6, 8), 3, stride=2, activation="silu"), conv(6, 8, 5, 1, n=1, norm=False, bias=True),
            conv(2, 4, (6, 5), (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2), residual=True)]
RINGS = list(itertools.product((2, 3, 5), (1, 2, 3)))  # STAGES, OUTPUTS


def simulate(problem, tile, outputs, programs, seed, fault=(None, "", "")):
    """The output of the kernel's text over the model, and what stock returns, both [N, P, Q, K] in fp64."""
    operands = inputs.make(problem._replace(dtype="fp32", device="cpu"))
    wide = {name: value.double() for name, value in operands._asdict().items() if isinstance(value, torch.Tensor)}
    flat = {name: value.permute(0, 2, 3, 1).reshape(-1).numpy() for name, value in wide.items() if value.ndim == 4}
    flat["y"] = np.full(np.prod(problem.output_shape), np.nan)
    views = conv_bn_act_tma.shapes(conv_bn_act_ws.unfolded(problem), tile)
    arguments = {name: None for name in ("residual", "bias", "gamma", "beta", "mean", "var")}
    arguments |= {name: gluon_model.Descriptor(data, *views[name]) for name, data in flat.items()}
    arguments |= {name: gluon_model.Vector(value.numpy()) for name, value in wide.items() if value.ndim == 1}
    arguments |= {"eps": operands.eps} | conv_bn_act_ws.constants(problem, tile) | {"OUTPUTS": outputs}
    broken, old, new = fault
    change = {module: (old, new) if module is broken else ("", "") for module in (WS, WINDOW)}
    helpers = gluon_model.plain(window, {"tl": gluon_model.TRITON}, *change[WINDOW])
    helpers |= gluon_model.plain(epilogue, {"tl": gluon_model.TRITON})
    shared = {name: helpers[name] for name in ("advance", "corner", "tap", "turn", "fold", "activate")}
    for pid in range(min(programs, arguments["tiles"])):
        machine = gluon_model.Multiprocessor(pid, programs, f"{seed} {pid}")
        kernel = gluon_model.plain(conv_bn_act_ws, machine.names() | shared, *change[WS])["conv_ws"]
        kernel(**arguments)
    n, k, p, q = problem.output_shape
    expected = inputs.stock(problem, operands, torch.float64).permute(0, 2, 3, 1).numpy()
    return flat["y"].reshape(n, p, q, k), expected


def sound(problem, stages, outputs, swap, programs, seed, fault=(None, "", "")):
    tile = Tile("ws", 8, 4, 2, num_stages=stages, SWAP=swap)
    found, expected = simulate(problem, tile, outputs, programs, seed, fault)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("stages", "outputs"), RINGS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_the_kernel_is_sound_in_any_order(problem, stages, outputs):
    for seed, programs in enumerate((1, 2, 3)):
        sound(problem, stages, outputs, bool(seed % 2), programs, seed)


# What is broken -> (file, what stands there, what is put there instead).
FAULTS = {
    "the loads wait for the wrong phase": (WS, "mbarrier.wait(free.index(slot), phase ^ 1)\n            arrived",
                                           "mbarrier.wait(free.index(slot), phase)\n            arrived"),
    "the loads do not wait": (WS, "mbarrier.wait(free.index(slot), phase ^ 1)\n            arrived", "arrived"),
    "the products wait for the wrong phase": (WS, "mbarrier.wait(full.index(slot), phase)",
                                              "mbarrier.wait(full.index(slot), phase ^ 1)"),
    "phases do not turn": (WINDOW, "phase ^ around", "phase"),
    "a ring has a buffer more": (WINDOW, "around = (slot + 1) // SLOTS", "around = slot // SLOTS"),
    "the running product's buffer is freed": (WS, "mbarrier.arrive(free.index(before), pred=step > 0)",
                                              "mbarrier.arrive(free.index(slot), pred=step > 0)"),
    "a buffer is freed before there was a product": (WS, "before), pred=step > 0)", "before))"),
    "two products may run": (WS, "warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,"),
    "the last buffer of a tile is kept": (WS, "        mbarrier.arrive(free.index(before))\n", ""),
    "a tile is finished before its last product": (WS, "warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,"),
    "one warp arrives before the others are done": (WS, "gl.thread_barrier()  # one thread arrives", "#"),
    "one warp arrives early at the end of a tile": (
        WS, "gl.thread_barrier()\n        mbarrier.arrive(free.index(before))", "mbarrier.arrive(free.index(before))"),
    "only x is waited for": (WS, "x.block_type.nbytes + weight.block_type.nbytes", "x.block_type.nbytes"),
    "the residual is not waited for": (WS, "mbarrier.wait(full_blocks.index(out), out_phase)", "pass"),
    "the residual does not wait": (
        WS, "mbarrier.wait(free.index(slot), phase ^ 1)\n            mbarrier.expect", "mbarrier.expect"),
    "a block is freed while it leaves": (WS, "free_blocks.index(stored)", "free_blocks.index(out)"),
    "a block is freed that never was filled": (WS, ", pred=tile >= gl.num_programs(0) * STORES)", ")"),
    "a block leaves unfenced": (WS, "        fence_async_shared()\n        gl.thread_barrier()\n",
                                "        gl.thread_barrier()\n"),
    "a block leaves before all warps wrote it": (WS, "        fence_async_shared()\n        gl.thread_barrier()\n",
                                                 "        fence_async_shared()\n"),
    "stores are not waited for": (WS, "tma.store_wait(STORES)", "tma.store_wait(STORES + 1)"),
    "one warp frees a block that leaves from others": (WS, "gl.thread_barrier()  # every warp waits", "#"),
    "the program ends before its last store": (WS, "    tma.store_wait(0)\n", ""),
    "all residuals go to the first block": (WS, "slot, phase = turn(slot, phase, OUTPUTS)", "pass"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault):
    with pytest.raises(AssertionError):
        for seed, (problem, (stages, outputs)) in enumerate(itertools.product(PROBLEMS[:3], RINGS)):
            sound(problem, stages, outputs, bool(seed % 2), 1 + seed % 2, seed, FAULTS[fault])
