"""What holds for the CUDA kernels of roi_align and roi_pool alone; the rest is in test_gpu_kernels.py."""

from __future__ import annotations

import pytest
import torch

import pyzoo
from pyzoo import _C

pytestmark = pytest.mark.skipif(
    _C.build_info()["cuda_archs"] != "emulated", reason="needs a build with PYZOO_CUDA=emulate"
)


@pytest.fixture(autouse=True)
def cuda():
    with pyzoo.backend("cuda"):
        yield


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [5, 300])
def test_argmax(layout, channels):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 11, 9, generator=g).to(memory_format=layout)
    boxes = torch.tensor([[0.0, 1, 1, 7, 8], [1, 0, 2, 4, 3], [1, 8, 8, 30, 30], [0, 20, 20, 30, 30]])
    want, want_argmax = pyzoo.ops.roi_pool_reference(x, boxes, 3, return_argmax=True)
    output = torch.empty_like(want, memory_format=layout)
    argmax = torch.empty_like(output, dtype=torch.int32)
    _C.roi_pool_fwd_cuda(x, boxes, output, argmax, 1.0)
    assert torch.equal(output, want)
    assert torch.equal(argmax, want_argmax)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("op", [pyzoo.ops.roi_align, pyzoo.ops.roi_pool])
def test_maps_are_read_where_they_are_by_few_boxes_and_copied_for_many(op, layout):
    """With the same values."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, 70, 70, generator=g).to(memory_format=layout)
    boxes = torch.cat([torch.zeros(40, 1), 10 + 10 * torch.rand(40, 4, generator=g).cumsum(1)], 1)
    few, many = op(x, boxes[:1], 3), op(x, boxes, 3)
    assert torch.equal(few, many[:1])
    torch.testing.assert_close(many, getattr(pyzoo.ops, f"{op.__name__}_reference")(x, boxes, 3), rtol=1e-5, atol=1e-5)
