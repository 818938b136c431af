"""The Triton kernels compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.test_gpu_kernels import ROOT, SLICES

pytest.importorskip("triton")

# What a block may have on every GPU since Ampere. The stack is what functions keep there, as the division of IEEE 754;
# the sampler, one kernel for all networks, keeps a little more around them.
LIMITS = {"registers": 255, "stack": 64, "shared": 99 << 10}
SAMPLER = {**LIMITS, "stack": 192}
ARCHS = (80, 90)


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    """One for each architecture, all at the same time: the process, and what it writes."""
    folder, started = tmp_path_factory.mktemp("triton"), {}
    for arch in ARCHS:
        program = [sys.executable, "-m", "tests.triton_offline", str(arch)]
        env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / f"cache_{arch}")}
        output, errors = folder / f"{arch}.jsonl", folder / f"{arch}.txt"
        with output.open("w") as out, errors.open("w") as err:
            started[arch] = subprocess.Popen(program, cwd=ROOT, env=env, stdout=out, stderr=err), output, errors
    yield started
    for process, _, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_for_gpus_that_are_not_here(arch, compilers):
    """For the shapes of the quick benchmarks, within what every GPU can launch, without spilling registers, and, with
    the same Triton, with no more of anything than the table says."""
    process, output, errors = compilers[arch]
    assert process.wait() == 0, errors.read_text()[-4000:]
    kernels = [json.loads(line) for line in output.read_text().splitlines()]
    assert {kernel["slice"] for kernel in kernels} == SLICES
    table = json.loads((ROOT / "tests" / "triton_resources.json").read_text())
    allowed = table.get(f"sm_{arch}") if table["triton"] == version("triton") else None
    too_much = []
    for kernel in kernels:
        limits = SAMPLER if kernel["slice"] == "pixelcnn_sample" else LIMITS
        most = allowed[kernel["kernel"]] if allowed else limits
        if any(kernel[name] > min(most[name], limits[name]) for name in limits):
            too_much.append(f"{kernel}, allowed {most}")
    assert not too_much, "\n".join(too_much)
