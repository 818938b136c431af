"""python -m tests.triton_offline ARCH: compiles all that the launchers of the Triton kernels launch in the quick
benchmarks, in float32, float16 and bfloat16, for a GPU that need not be here (80 is an A100, 90 an H100, 100 a B200):
with the default configuration and those measured for that GPU, with --all each candidate.

Prints a line of JSON for each compiled kernel: its registers, the bytes of its stack, where spilled registers go, and
its shared memory. With --write, the most that each kernel takes goes to ``triton_resources.json``, which a test holds
against what it finds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.measure import move
from pyzoo import _backend
from pyzoo.kernels import _configs
from tests.specs import pixelcnn_sample, reversible
from tests.test_gpu_kernels import SPECS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # float64 is there to check results
RESOURCES = ("registers", "stack", "shared")
TABLE = Path(__file__).parent / "triton_resources.json"
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
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def main(arch: int, every: bool) -> list[dict]:
    driver.set_active(AbsentGPU(arch))
    _backend.why_not = lambda *_: None
    _configs.family = lambda device: f"sm_{arch}"
    compile, seen, found = JITFunction.run, set(), []

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = compile(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            about = {"kernel": self.__name__, "slice": self.module.rpartition(".")[2]}
            about |= {"case": case.id, "dtype": str(dtype)}
            found.append({**about, **resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared})
            print(json.dumps(found[-1]), flush=True)

    JITFunction.run = compile_only
    _backend.backend("triton")
    for spec in (*SPECS, pixelcnn_sample.SPEC, reversible.SPEC):
        for dtype in DTYPES:
            for case in spec.bench():
                if case.quick:
                    more = [False]  # whether there is another configuration to compile
                    for number in itertools.count():
                        more[0] = False
                        _configs.choose = functools.partial(choose, number, every, more)
                        launch(spec, case, dtype)
                        if not more[0]:
                            break
    return found


def choose(number: int, every: bool, more: list[bool], kernel, candidates, family, dtype, shape):
    """The configuration of that number, of those to compile."""
    stored = [entry["config"] for entry in _configs.measured(family).get(kernel, []) if entry["dtype"] == dtype]
    chosen = [config for i, config in enumerate(candidates) if every or i == 0 or config in stored]
    more[0] |= number + 1 < len(chosen)
    return chosen[min(number, len(chosen) - 1)]


def most(found: list[dict]) -> dict[str, dict[str, int]]:
    """What each kernel takes at most."""
    names = sorted({kernel["kernel"] for kernel in found})
    return {n: {r: max(k[r] for k in found if k["kernel"] == n) for r in RESOURCES} for n in names}


def launch(spec, case, dtype) -> None:
    with _backend.backend(None):  # it may call operators
        args, kwargs = case.make()
    cast = spec.differentiable or range(len(args))
    args, leaves = [move(arg, "cpu", dtype if i in cast else None) for i, arg in enumerate(args)], []

    def leaf(x):
        leaves.append(x.requires_grad_())
        return leaves[-1]

    args = [tree_map(leaf, arg) if i in spec.differentiable else arg for i, arg in enumerate(args)]
    out = spec.op(*args, **{**spec.static, **kwargs})  # nothing runs: no shape may depend on a result
    if case.backward:
        torch.autograd.grad(out, leaves, torch.empty_like(out))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found = most(main(args.arch, args.all))
    if args.write:
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        before = table if table.get("triton") == triton.__version__ else {}
        table = {**before, "triton": triton.__version__, f"sm_{args.arch}": found}
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
