"""`python -m tests.gate.check_sm90 FILE`: what the tests of the emulated sm_90a convolution check, in small.

On a module built elsewhere, in a process of its own, because all libraries of a process share the statics of inline
functions.
"""

import sys

from fused_resnet.testing import inputs
from tests.csrc import conftest
from tests.csrc import test_emulated_conv as convs
from tests.csrc import test_emulated_sm90 as hopper


def main() -> None:
    module = conftest.module_from("fused_resnet_sm90", sys.argv[1])
    several = hopper.PROBLEMS[1]._replace(N=6, K=136)  # tiles of which a block makes more than two, with a residual
    for problem, seeds in ((hopper.PROBLEMS[2], 1), (several, 3)):
        operands = inputs.make(problem)
        for tile in hopper.SM90:
            for seed in range(seeds):
                convs.agree(problem, operands, hopper.emulate(module, problem, operands, tile, seed, processors=1))
    print("all agree")


if __name__ == "__main__":
    main()
