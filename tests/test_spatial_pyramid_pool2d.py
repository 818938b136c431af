"""What the battery does not ask of spatial pyramid pooling: which maximum gets the gradient, every small map, and the
mean where one typical call stands for all."""

import pytest
import torch
from torch.nn import functional as F

from pyzoo.nn import SpatialPyramidPool2d
from pyzoo.ops import spatial_pyramid_pool2d, spatial_pyramid_pool2d_reference
from tests.specs import inputs

LAYOUTS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])


@LAYOUTS
@pytest.mark.parametrize("mode", ["max", "avg"])
def test_every_small_map(mode, memory_format):
    """Bins that share pixels, levels finer than the map, rows pooled first or not."""
    for height in range(1, 25):
        for width in range(1, 25, 1 + height % 3):
            x = inputs.features(1, 2, height, width, memory_format=memory_format, dtype=torch.float64)
            for levels in ((6, 3, 2, 1), (4, 2, 1), (5, (1, 7))):
                actual = spatial_pyramid_pool2d(x, levels, mode)
                torch.testing.assert_close(actual, spatial_pyramid_pool2d_reference(x, levels, mode))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(5, 7), (30, 9), (64, 70)])
def test_pixels_of_the_maxima_are_those_of_torch(size, dtype, memory_format):
    """The first of equal ones, the last NaN."""
    x = inputs.features(2, 19, *size, dtype=dtype).mul(2).round()
    x[torch.rand(x.shape, generator=inputs.generator(1)) < 0.02] = inputs.NAN
    x[0, 3] = -inputs.INF
    x = x.contiguous(memory_format=memory_format)
    levels = (1, 2, 3, 6, (4, 5))
    _, argmax = torch.ops.pyzoo._spatial_pyramid_pool2d_argmax(
        x, [n for k in levels for n in (k if k == (4, 5) else (k, k))]
    )
    expected = [F.adaptive_max_pool2d(x, level, return_indices=True)[1].flatten(1) for level in levels]
    assert torch.equal(argmax, torch.cat(expected, 1).int())


def test_gradient_beside_an_argmax_out_of_range():
    """The core does not trust positions that it did not compute."""
    for x in (torch.zeros(1, 20, 4, 4), torch.zeros(1, 20, 90, 90).contiguous(memory_format=torch.channels_last)):
        argmax = torch.tensor([-1, 2**31 - 1, 3, -(2**31)], dtype=torch.int32).repeat(1, 5)
        last = x.is_contiguous(memory_format=torch.channels_last)
        grad = torch.ops.pyzoo._spatial_pyramid_pool2d_backward(torch.ones(1, 20), argmax, [1, 1], *x.shape[1:], last)
        assert grad.sum() == 5
        assert grad[0, 2::4, 0, 3].sum() == 5


@LAYOUTS
def test_mean_through_transforms_and_compilers(memory_format):
    x = inputs.features(3, 20, 11, 9, dtype=torch.float64, memory_format=memory_format).requires_grad_()

    def pool(x):
        return spatial_pyramid_pool2d(x, (1, 2, 4), "avg")

    assert torch.autograd.gradgradcheck(pool, x[:1, :2].detach().requires_grad_(), check_fwd_over_rev=True)
    torch.library.opcheck(torch.ops.pyzoo.spatial_pyramid_pool2d.default, (x, [1, 1, 4, 4], True))
    grad = torch.rand(3, 20 * 16, dtype=torch.float64, requires_grad=True)
    backward = torch.ops.pyzoo._spatial_pyramid_pool2d_backward.default
    torch.library.opcheck(backward, (grad, None, [4, 4], 20, 11, 9, False))
    torch._dynamo.reset()
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), pool(x))
    torch.testing.assert_close(
        torch.vmap(pool)(torch.stack([x, -x], 1).movedim(1, 0)), torch.stack([pool(x), -pool(x)])
    )


def test_same_bits_for_any_number_of_threads(set_threads):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = inputs.features(2, 100, 57, 83, memory_format=memory_format).requires_grad_()
        results = []
        for threads in (1, 2, 4):
            set_threads(threads)
            out = spatial_pyramid_pool2d(x, (1, 3, 8), "avg")
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


def test_module():
    pool = SpatialPyramidPool2d((6, 3, 2, 1))
    for side in (13, 10):  # maps of SPP-net for images of 224 and 180 pixels
        assert pool(torch.rand(2, 256, side, side)).shape == (2, 12800)
    assert str(pool) == "SpatialPyramidPool2d(levels=(6, 3, 2, 1), mode='max')"


def test_calls_in_turns_do_not_share_a_plan():
    """The core keeps the plan of the last call of a thread."""
    wide, high = torch.randn(2, 5, 7, 12), torch.randn(2, 5, 12, 7)
    for _ in range(2):
        for x in (wide, high):
            for levels in ((1, 2, 3), (3, 2, 1), ((2, 3), (3, 2))):
                for mode in ("max", "avg"):
                    expected = spatial_pyramid_pool2d_reference(x, levels, mode)
                    torch.testing.assert_close(spatial_pyramid_pool2d(x, levels, mode), expected)
