"""python -m tests.triton_offline ARCH: compiles all that the launchers of the Triton kernels launch in the quick
benchmarks, in each dtype, for a GPU that need not be here (80 is an A100, 90 an H100, 100 a B200).

Prints a line of JSON for each compiled kernel: its registers, the bytes it spills and its shared memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pyzoo import _backend
from tests.test_triton import SPECS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class AbsentGPU:
    """All that Triton asks of its driver before it launches."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        )
    found = dict(re.findall(r"(\w+):(\d+)", dump.stdout))
    return {"registers": int(found["REG"]), "spilled": int(found["LOCAL"])}


def main(arch: int) -> None:
    driver.set_active(AbsentGPU(arch))
    _backend.why_not = lambda *_: None
    compile, seen = JITFunction.run, set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = compile(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            about = {
                "kernel": self.__name__,
                "slice": self.module.rpartition(".")[2],
                "case": case.id,
                "dtype": str(dtype),
            }
            print(json.dumps({**about, **resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared}))

    JITFunction.run = compile_only
    _backend.backend("triton")
    for spec in SPECS:
        for dtype in spec.dtypes:
            for case in spec.bench():
                if case.quick:
                    launch(spec, case, dtype)


def launch(spec, case, dtype) -> None:
    args, kwargs = case.make()
    leaves = []

    def leaf(x):
        leaves.append(x.to(dtype).requires_grad_())
        return leaves[-1]

    args = [tree_map(leaf, arg) if i in spec.differentiable else arg for i, arg in enumerate(args)]
    out = spec.op(*args, **kwargs)
    if case.backward:
        torch.autograd.grad(out, leaves, torch.empty_like(out))


if __name__ == "__main__":
    main(int(sys.argv[1]))
