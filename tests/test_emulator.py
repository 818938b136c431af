"""The emulator of CUDA has teeth: of each fault it says what and where."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NO_BARRIER = "with no barrier between"
FAULTS = {
    "none": "right",
    "barrier": f"reads shared memory that thread .* wrote, {NO_BARRIER}|nobody wrote",
    "second_barrier": f"writes shared memory that another thread reads, {NO_BARRIER}|that thread .*, {NO_BARRIER}",
    "bound": r"thread \d+ of block \(\d, 0, 0\): shared memory: index 32 of 32",
    "unwritten": "reads shared memory that nobody wrote",
    "early_return": "waits at a barrier that others of its block never reach",
    "lane": "waits at a barrier that others of its warp never reach",
    "warp_barrier": f"shared memory .*, {NO_BARRIER}|nobody wrote",
    "other_warp": f"shared memory that thread .*, {NO_BARRIER}|nobody wrote",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++")) or pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("emulator") / "faults"
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}"]
    source = ROOT / "tests" / "emulator" / "faults.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", *folders, source, "-o", program], check=True)
    return program


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault, program):
    done = subprocess.run([program, fault], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(FAULTS[fault], done.stdout), done.stdout
