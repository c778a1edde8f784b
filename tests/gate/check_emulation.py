"""`python -m tests.gate.check_emulation FILE`: what the emulation's tests check, in small, on a module built elsewhere.

A process for each module: statics of inline functions are one for all libraries of a process.
"""

import sys

from fused_resnet.testing import inputs
from tests.csrc import conftest
from tests.csrc import test_emulated_bn_act as norms
from tests.csrc import test_emulated_conv as convs
from tests.kernels import training


def main() -> None:
    module = conftest.module_from("fused_resnet_testing", sys.argv[1])
    convs.test_a_pixel_that_is_not_a_number_reaches_its_windows_alone(module)
    for problem in convs.PROBLEMS[1:3]:
        for seed in range(3):
            operands = inputs.make(problem)
            convs.agree(problem, operands, convs.emulate(module, problem, operands, seed))
    for kernel, agree in norms.KERNELS.items():
        norms.test_nan_and_inf_go_where_stock_sends_them(module, kernel)
        problem = training.norm(3, 3, n=1)
        operands = training.norm_operands(problem)
        agree(problem, operands, norms.emulate(module, kernel, problem, operands))
    print("all agree")


if __name__ == "__main__":
    main()
