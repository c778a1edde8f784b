"""`python -m tests.gate.check_emulation UNIT=FILE ...`: what the emulation's tests check, in small, on modules built
elsewhere; prints a line of JSON, UNIT=FILE -> what was noticed, or null.

A process for each module, forked: statics of inline functions are one for all libraries of a process, and a fault may
take the process with it.
"""

import json
import os
import signal
import sys

from fused_resnet.testing import inputs
from tests.csrc import conftest
from tests.csrc import test_emulated_bn_act as norms
from tests.csrc import test_emulated_conv as convs
from tests.csrc import test_emulated_stem as stems
from tests.csrc import test_finalise as statistics
from tests.kernels import training

SECONDS = 60


def check_conv(module):
    """Each kind once: dense, groups, depthwise, ragged, prologue; in three orders of the threads where it is cheap."""
    for problem in (convs.PROBLEMS[1], convs.PROBLEMS[2], convs.GROUPED[0], convs.GROUPED[1], convs.DEPTHWISE[0],
                    convs.RAGGED[0], convs.PROLOGUES[0], convs.PROLOGUES[4], convs.PROLOGUES[5]):
        operands = inputs.make(problem)
        for seed in range(3):
            convs.agree(problem, operands, convs.emulate(module, problem, operands, seed))
    convs.test_what_is_no_number_reaches_its_windows_and_its_group_alone(module, convs.PROBLEMS[1], float("nan"))


def check_bn_act(module):
    for kernel, agree in norms.KERNELS.items():
        norms.test_nan_and_inf_go_where_stock_sends_them(module, kernel)
        problem = training.norm(3, 3, n=1)
        operands = training.norm_operands(problem)
        agree(problem, operands, norms.emulate(module, kernel, problem, operands))


def check_stem(module):
    for problem in (stems.PROBLEMS[1], stems.PROBLEMS[2], stems.PROBLEMS[7]):
        operands = inputs.make(problem)
        for seed in range(3):
            convs.agree(problem, operands, stems.emulate(module, problem, operands, seed), stems.FAMILY)
    stems.test_what_is_no_number_goes_where_stock_sends_it(module, stems.PROBLEMS[1], float("nan"))
    stems.test_what_is_no_number_goes_where_stock_sends_it(module, stems.PROBLEMS[1], float("inf"))


def check_finalise(module):
    def run(*args, **options):
        return [statistics.emulated(module, *args, **options, seed=seed) for seed in range(3)][-1]

    for count, k, span in statistics.SIZES[:1] + statistics.SIZES[4:5]:
        statistics.test_statistics_are_those_of_the_elements(run, count, k, span, statistics.torch.float64)
    statistics.test_momentum(run, None)
    statistics.test_a_mean_far_from_zero_costs_no_digits_of_the_variance(run)


CHECKS = {"conv": check_conv, "bn_act": check_bn_act, "stem": check_stem, "finalise": check_finalise}


def verdict(unit, file):
    """What the check of a unit says of a module, from a process of its own: None, or its last words."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.close(read)
        try:
            CHECKS[unit](conftest.module_from("fused_resnet_testing", file))
            os.write(write, b"all agree")
        except BaseException as error:  # an AssertionError or what the emulation throws
            os.write(write, f"{type(error).__name__}: {error}".encode()[:2000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return None if said == "all agree" else said or "the process was killed"


def main() -> None:
    pairs = [argument.partition("=")[::2] for argument in sys.argv[1:]]
    print(json.dumps({f"{unit}={file}": verdict(unit, file) for unit, file in pairs}))


if __name__ == "__main__":
    main()
