"""The kernels that measure a GPU compile for it and hold the instructions that they are there to time."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, torch
from fused_resnet.kernels.triton import probes
from fused_resnet.testing import aot

def counts(n):
    return torch.empty(n, dtype=torch.int32, device="meta")

read, _, arguments = probes.bind_read(counts(1 << 22), counts(528), 20)
read = aot.build(read, arguments, 90, probes.READ_OPTIONS)
touch = aot.build(probes.touch, {"x": counts(1), "WAIT": True}, 90, probes.TINY_OPTIONS | {"launch_pdl": True})
meet = aot.build(probes.meet, {"counter": counts(1), "ROUNDS": 9}, 90,
                 probes.TINY_OPTIONS | {"launch_cooperative_grid": True})
print(json.dumps({"read": read.asm["ptx"], "touch": touch.asm["ptx"], "meet": meet.asm["ptx"],
                  "spills": aot.inspect(read).spill_bytes, "pdl": touch.metadata.launch_pdl,
                  "cooperative": meet.metadata.launch_cooperative_grid}))
"""


def test_the_probes_time_what_they_say():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True,
                          cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "ld.global.cg.v4" in found["read"] and found["spills"] == 0, "reads go past L1, 16 bytes at a time"
    assert "griddepcontrol.wait" in found["touch"] and "griddepcontrol.launch_dependents" in found["touch"]
    assert "atom.global.gpu.acq_rel" in found["meet"] and "ld.global.gpu.acquire" in found["meet"]
    assert found["pdl"] and found["cooperative"]
