"""Do the tests of training bite? Each deliberate bug below must turn the test that is named beside it red."""

import importlib
import inspect

import pytest
import torch

from tests.fusing import pairs
from tests.fusing import test_training_autograd as autograd
from tests.fusing import test_training_loops as loops
from tests.fusing import test_training_norms as norms
from tests.nn import test_training as modules
from tests.ops import test_residual_branch as branch

ATEN, FAMILY, NORMS = "ops.residual_aten", "ops.residual_branch", "nn.training"
ROUTE, TRIAL, GUARDS = "fusing.route", "fusing.trial", "nn.guards"


def modes(name, recompute=False):
    return lambda: norms.test_modes_and_frozen_parts(pairs.pair(pairs.net(), recompute=recompute), name, "midway")


def of(test, *args, recompute=False):
    return lambda: test(pairs.pair(pairs.net(), recompute=recompute), *args)


def gradients(name, recompute=False):
    return lambda: branch.test_values_gradients_and_statistics_are_those_of_stock(
        name, torch.contiguous_format, recompute, False)


CHECKPOINTS = autograd.test_checkpoints_around_what_is_not_understood
CHANCE = norms.test_random_numbers_are_stocks_from_the_first_call_on
# What is broken -> (module, what stands there, what is put there instead, the test)
FAULTS = {
    "the shortcut has no gradient": (ATEN, "        joins = dz\n", "        joins = None\n", modes("eval")),
    "the projection's input has no gradient": (ATEN, "else grads[other].add_(joins)", "else grads[other]",
                                               modes("nothing")),
    "backward takes the stages forwards": (ATEN, "in reversed(range(len(spec.stages)))", "in range(len(spec.stages))",
                                           modes("nothing")),
    "an inner activation passes all gradients": (ATEN, "            dz = _mask(dz, source,",
                                                 "            _mask(dz.clone(), source,", modes("nothing")),
    "the last activation passes all gradients": (ATEN, "dy if mask is None else _threshold_backward(dy, mask, 0)",
                                                 "dy", modes("nothing")),
    "the bits are those of zeros, too": (ATEN, "bits.pack(passes(y, activation))", "bits.pack(y >= 0)",
                                         modes("nothing", True)),
    "what is made again has another eps": (ATEN, "stage.batch, 0.0, stage.eps,", "stage.batch, 0.0, 2 * stage.eps,",
                                           modes("nothing", True)),
    "what is made again is not activated": (ATEN, "        return z.relu_()\n    return F.hardtanh_(z, 0.0, 6.0) if",
                                            "        return z\n    return F.hardtanh_(z, 0.0, 6.0) if",
                                            modes("nothing", True)),
    "the shortcut is added twice": (ATEN, "        z += shortcut\n", "        z += 2 * shortcut\n", modes("nothing")),
    "ReLU6 is taken for ReLU": (ATEN, "torch.ops.aten.hardtanh_backward.grad_input(grad, y, 0.0, 6.0,",
                                "torch.ops.aten.hardtanh_backward.grad_input(grad, y, 0.0, 60.0,",
                                gradients("grouped-relu6")),
    "ReLU6 keeps what its reader may write over": (ATEN, 'bitwise = activation == "relu6" or spec', "bitwise = spec",
                                                   lambda: loops.test_results_that_stock_lets_be_written_over("ReLU6")),
    "a mask is read in another layout": (FAMILY, "torch.contiguous_format if y.is_contiguous() else ", "",
                                         modes("nothing", True)),
    "gradients of gradients forget the mask": (FAMILY, "    if mask is None:\n        dz = dy\n",
                                               "    if True:\n        dz = dy\n",
                                               of(autograd.test_penalties_on_gradients)),
    "batched gradients go to the kernels": (FAMILY, "if torch.is_grad_enabled() or _mapped(dy):",
                                            "if torch.is_grad_enabled():",
                                            of(autograd.test_batched_gradients_and_hessians)),
    "statistics are not updated": (NORMS, "momentum = 0.0 if norm.momentum is None else norm.momentum",
                                   "momentum = 0.0", modes("nothing")),
    "batches are counted twice": (NORMS, "tracked.add_(1)", "tracked.add_(2)", modes("nothing")),
    "batches are not counted": (NORMS, "tracked.add_(1)", "tracked.add_(0)", modes("nothing")),
    "the mean over all batches is late by one": (NORMS, "1.0 / float(tracked)", "1.0 / float(tracked + 1)",
                                                 modes("cumulative")),
    "a frozen norm takes the batch": (NORMS, "    return norm.training or buffers", "    return True or buffers",
                                      modes("frozen_norms")),
    "a norm that trains is taken for a frozen one": (NORMS, "    return norm.training or buffers", "    return buffers",
                                                     modes("nothing")),
    "one value a channel is normalised": (NORMS, "takes_batch(unit.norm) and shape[0] * p * q < 2", "False",
                                          lambda: modules.test_what_stock_would_complain_about_is_left_to_stock(
                                             modules.Chain(modules.unit(4, 4)), torch.randn(1, 4, 1, 1))),
    "the first call moves statistics twice": (TRIAL, "                with _unversioned(b):\n",
                                              "                if False:\n", modes("nothing")),
    "the first call draws other numbers": (TRIAL, "        torch.set_rng_state(self.chance)\n", "",
                                           lambda: CHANCE(norms.Random)),
    "a checkpoint meets the comparison": (TRIAL, "if route.opaque and torch.is_grad_enabled() and", "if False and",
                                          lambda: CHECKPOINTS(False)),
    "norms with two places are moved": (ROUTE, "places[str(m.norm.target)] == 1", "places[str(m.norm.target)] >= 1",
                                        norms.test_shared_convolutions_and_norms_move_statistics_in_stocks_order),
    "hooks inside are not looked for": (ROUTE, "executor.ambient(args, None) or self.guards.changed()",
                                        "executor.ambient(args, None)",
                                        lambda: autograd.test_backward_hooks_fire_as_in_stock("layer1")),
    "global backward hooks are not looked for": (GUARDS, '("forward", "forward_pre", "backward", "backward_pre")',
                                                 '("forward", "forward_pre")',
                                                 autograd.test_global_backward_hooks_see_every_module),
}


def functions(scope, module):
    """The functions that `scope` (a module's namespace) defines, by their qualified names."""
    found = {}
    for value in scope.values():
        if inspect.isclass(value) and value.__module__ == module:
            found.update(functions(vars(value), module))
        value = getattr(value, "__func__", value)
        if inspect.isfunction(value) and value.__module__ == module:
            found[value.__qualname__] = inspect.unwrap(value)
    return found


@pytest.fixture
def broken(request, monkeypatch):
    """Puts a fault into the live module: its functions get the code, its constants the values of the changed source."""
    name, old, new, test = FAULTS[request.param]
    module = importlib.import_module(f"fused_resnet.{name}")
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{name}: the source has changed, the fault no longer stands in it: {old!r}"
    scope = {"__name__": module.__name__}
    exec(compile(source.replace(old, new), module.__file__, "exec"), scope)
    theirs = functions(scope, module.__name__)
    for key, function in functions(vars(module), module.__name__).items():
        monkeypatch.setattr(function, "__code__", theirs[key].__code__)
    for key, value in scope.items():
        if type(value) is tuple and key.isupper():
            monkeypatch.setattr(module, key, value)
    return test


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("broken", FAULTS, indirect=True)
def test_every_fault_turns_its_test_red(broken):
    with pytest.raises((AssertionError, RuntimeError, IndexError)) as caught:
        broken()
    assert "the source has changed" not in str(caught.value)


def test_every_named_test_is_green_without_its_fault():
    for *_, test in FAULTS.values():
        test()
