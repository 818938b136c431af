"""The CUDA kernels as nvcc compiled them. That they are right is shown by ``test_gpu_kernels.py`` without a GPU, by
``test_ops.py`` with one."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from pyzoo._ext import C
from tests import cuda_resources

_CALL = "a register or two are kept across the call of a function (division), outside of any loop over memory"
SPILLS = {  # kernel -> why it may have a stack or spill
    "gram_matrix_gram_matrix/gram_difference_kernel": _CALL,
    "roi_pool_roi_pool/roi_pool_fwd_kernel": _CALL,
}


@pytest.mark.skipif(C.build_info()["cuda_archs"] in ("", "emulated"), reason="the core was built without nvcc")
def test_resources():
    """No kernel spills registers or keeps an array in local memory, and, with the same compiler, none takes more than
    the table says."""
    kernels = cuda_resources.found()
    if not kernels:
        pytest.skip("the core was built elsewhere")
    archs = {f"sm_{arch}" for arch in C.build_info()["cuda_archs"].split()}
    table = json.loads(cuda_resources.TABLE.read_text())
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    known = table["kernels"] if nvcc and cuda_resources.version(nvcc) == table["nvcc"] else {}
    too_much = []
    for name, of_archs in kernels.items():
        assert set(of_archs) == archs, name
        for arch, takes in of_archs.items():
            if name not in SPILLS and (takes["spilled"] or takes["stack"]):
                too_much.append(f"{name} on {arch} spills: {takes}")
            most = known.get(name, {}).get(arch, takes) if known else takes
            if any(takes[what] > most[what] for what in takes):
                too_much.append(f"{name} on {arch} takes {takes}, allowed {most}")
    assert not too_much, "\n".join(too_much)
    assert not known or set(kernels) <= set(known), "write the table: python -m tests.cuda_resources --write"


def test_kernel_name():
    """The name of a file's anonymous namespace ends with any digits."""
    mangled = "_ZN5pyzoo44_GLOBAL__N__a9bc9bc9_11_roi_pool_cu_22b0e65618place_boxes_kernelILi1EEEvi"
    assert cuda_resources.kernel_name(mangled) == "place_boxes_kernel"
