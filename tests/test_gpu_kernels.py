"""The kernels for a GPU without one: those of Triton in its interpreter, those in CUDA C++ in a core built with
``PYZOO_CUDA=emulate``, as ``make asan`` does. The samples of the specs, and what no sample reaches.

On a machine with a GPU, ``PYZOO_TEST_DEVICE=cuda PYZOO_BACKEND=triton`` (or ``cuda``) runs ``test_ops.py`` on them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import pyzoo
from pyzoo import _backend
from pyzoo.ops import reversible as coupling
from pyzoo.ops.channel_sum import channel_sum
from tests import test_ops
from tests.specs import batched_nms, inputs, nms
from tests.stacks import check_step, make_input, make_stack

ROOT = Path(__file__).parent.parent
SLICES = {path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")}
SPECS = [spec for spec in test_ops.SPECS if spec.op.__module__.rpartition(".")[2] in SLICES]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, on what a mask then drops


def some(found: list, spec, dtype, layout) -> list:
    """Few enough for a backend that is not made to run here, others for each dtype and layout: of the samples a fifth,
    or, since Triton's interpreter takes a millisecond a statement, four of the smaller ones."""
    cell = [(d, at.name) for d in spec.dtypes for at in test_ops.layouts(spec)].index((dtype, layout.name))
    if _backend.forced == "cuda":
        return found[cell % 5 :: 5]
    median = sorted(map(numbers, found))[len(found) // 2]
    few = [sample for sample in found if numbers(sample) <= median]
    step = max(len(few) // 4, 1)
    return few[cell % step :: step][:4]


def numbers(sample) -> int:
    leaves = tree_leaves((sample.args, sample.kwargs))
    return sum(x.numel() for x in leaves if isinstance(x, torch.Tensor))


@test_ops.each_cell(SPECS)
def test_forward(spec, dtype, layout, gpu_backend, poison):
    for sample in some(test_ops.samples(spec, dtype, layout), spec, dtype, layout):
        actual = spec.op(*sample.args, **sample.kwargs)
        test_ops.check(spec, actual, test_ops.expected_of(spec, dtype, sample), sample.id)


@test_ops.each_cell([spec for spec in SPECS if spec.differentiable])
def test_backward(spec, dtype, layout, gpu_backend, poison):
    for sample in some(test_ops.samples(spec, dtype, layout, only=test_ops.finite), spec, dtype, layout):
        _, actual = test_ops.gradients(spec.op, spec, sample)
        test_ops.check(spec, actual, test_ops.expected_gradients_of(spec, dtype, sample), sample.id)


@pytest.mark.parametrize("op", [pyzoo.ops.roi_align, pyzoo.ops.roi_pool])
def test_image_out_of_range_shows(op, gpu_backend):
    """A kernel on a GPU cannot raise."""
    boxes = torch.tensor([[2.0, 0, 0, 3, 3], [-1, 0, 0, 3, 3], [float("nan"), 0, 0, 3, 3], [1, 0, 0, 3, 3]])
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    out = op(x, boxes, 2)
    assert out.isnan().flatten(1).all(1).tolist() == [True, True, True, False]
    out.sum().backward()
    assert not x.grad[0].any()
    assert x.grad[1].sum().item() == pytest.approx(3 * 4)


@pytest.mark.parametrize("limit", [None, 30])
def test_nms_in_chunks(limit, gpu_backend, monkeypatch):
    """Which no sample is large enough for. From 8193 boxes on, a block of the CUDA kernel ranks by several tiles."""
    if gpu_backend == "triton":
        monkeypatch.setattr("pyzoo.kernels.nms.CHUNK", 512)
    for op, reference, more, count in (
        (pyzoo.ops.nms, pyzoo.ops.nms_reference, (), 4500 if limit else 8200),
        (pyzoo.ops.batched_nms, pyzoo.ops.batched_nms_reference, (batched_nms.classes(4500, 3),), 4500),
    ):
        count = 700 if gpu_backend == "triton" else count
        args = nms.clustered(count), nms.random_scores(count), *(x[:count] for x in more), 0.5
        actual = op(*args, max_output=limit)
        torch.testing.assert_close(actual, reference(*args, max_output=limit), rtol=0, atol=0)


def test_nms_of_columns(gpu_backend):
    """Scores and boxes that are not neighbours in memory."""
    torch.manual_seed(0)
    corner, size = torch.rand(70, 2) * 40, torch.rand(70, 2) * 20
    table = torch.cat([corner, corner + size, torch.rand(70, 3)], 1)
    kept = pyzoo.ops.nms(table[:, :4], table[:, 5], 0.3)
    assert kept.tolist() == pyzoo.ops.nms(table[:, :4].contiguous(), table[:, 5].contiguous(), 0.3).tolist()
    assert 10 < len(kept) < 60


def laid_out(x, strides, offset=0):
    """A copy in memory that ends with its last number."""
    memory = x.new_empty(offset + 1 + sum(max(n - 1, 0) * s for n, s in zip(x.shape, strides, strict=True)))
    return memory.as_strided(x.shape, strides, offset).copy_(x)


def apart(x, dim):
    """A copy whose neighbours along ``dim`` lie one number further apart, and which begins one number later if None."""
    strides = [s if dim is None or s < x.stride(dim) else s + s // x.stride(dim) for s in x.stride()]
    return laid_out(x, strides, int(dim is None))


BOXES = torch.tensor([[0.0, 1, 1, 14, 7], [1, 0, 2, 9, 5]])
OF_MAPS = {
    "roi_align": lambda x, weight: pyzoo.ops.roi_align(x, BOXES, 4),
    "roi_pool": lambda x, weight: pyzoo.ops.roi_pool(x, BOXES, 4),
    "depthwise_conv2d": lambda x, weight: pyzoo.ops.depthwise_conv2d(x, weight[:, :1], padding=1),
    "masked_conv2d": lambda x, weight: pyzoo.ops.masked_conv2d(x, weight, mask="B"),
    "gram_matrix": lambda x, weight: pyzoo.ops.gram_matrix(x),
    "spatial_pyramid_pool2d": lambda x, weight: pyzoo.ops.spatial_pyramid_pool2d(x, (1, 4), "avg"),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("op", OF_MAPS.values(), ids=OF_MAPS)
@pytest.mark.parametrize("gpu_backend", ["cuda"], indirect=True)
def test_sixteen_bytes_are_read_at_once_where_they_are_aligned(op, layout, gpu_backend):
    def gradients(x, placed):
        weight = inputs.features(x.shape[1], x.shape[1], 3, 3, dtype=x.dtype, seed=1)
        leaves = [t.detach().requires_grad_() for t in (placed(x), weight)]
        out = op(*leaves)
        grad = inputs.features(*out.shape, dtype=out.dtype, seed=2)
        grad = placed(grad.contiguous(memory_format=layout)) if out.dim() == 4 else grad
        return out.detach(), *torch.autograd.grad(out, leaves, grad, allow_unused=True)

    def wider(dim):  # with strides that packs divide, though not the size
        more = lambda x: torch.cat([x, x.narrow(dim, 0, 3)], dim).contiguous(memory_format=layout)  # noqa: E731
        return lambda x: laid_out(x, more(x).stride())

    dims = (None, 0, 1, 2, 3)
    for channels, width, places in (
        (16, 16, [partial(apart, dim=dim) for dim in dims]),
        (13, 16, [wider(1)]),
        (16, 13, [wider(3)]),
    ):
        x = inputs.features(2, channels, 8, width, dtype=torch.float16, memory_format=layout)
        expected = gradients(x, lambda x: x)
        for placed in places:
            torch.testing.assert_close(gradients(x, placed), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("op", [pyzoo.ops.roi_align, pyzoo.ops.roi_pool])
@pytest.mark.parametrize("gpu_backend", ["cuda"], indirect=True)
def test_many_boxes_of_one_place(op, layout, gpu_backend, poison):
    """More than a block takes at a time; and enough to copy the map before it is read."""
    x = inputs.features(1, 40, 20, 20, memory_format=layout).requires_grad_()
    sides = 4 + 4 * torch.rand(40, 4, generator=inputs.generator()).cumsum(1)
    boxes = torch.cat([torch.tensor([[0.0, 2, -1, 4, 0]]), torch.cat([torch.zeros(40, 1), sides], 1)])
    few, many = op(x, boxes[:1], 3), op(x, boxes, 3)
    expected = getattr(pyzoo.ops, f"{op.__name__}_reference")(x, boxes, 3)
    assert torch.equal(few, many[:1])
    torch.testing.assert_close(many, expected, rtol=1e-5, atol=1e-5)
    grad_output = torch.randn_like(expected)
    for actual, want in zip(*(torch.autograd.grad(out, x, grad_output) for out in (many, expected)), strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [5, 300])
def test_roi_pool_argmax(layout, channels, gpu_backend, poison):
    x = inputs.features(2, channels, 11, 9, memory_format=layout)
    boxes = torch.tensor([[0.0, 1, 1, 7, 8], [1, 0, 2, 4, 3], [1, 8, 8, 30, 30], [0, 20, 20, 30, 30]])
    _, expected = pyzoo.ops.roi_pool_reference(x, boxes, 3, return_argmax=True)
    assert torch.equal(torch.ops.pyzoo._roi_pool_argmax(x, boxes, 1.0, 3, 3), expected)


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_spatial_pyramid_of_a_map_wider_than_a_block(mode, gpu_backend):
    x = torch.randn(1, 3, 4, 300)
    for layout in (torch.contiguous_format, torch.channels_last):
        args = x.contiguous(memory_format=layout), (1, (2, 3)), mode
        actual, expected = pyzoo.ops.spatial_pyramid_pool2d(*args), pyzoo.ops.spatial_pyramid_pool2d_reference(*args)
        torch.testing.assert_close(actual, expected)


def test_roi_pool_backward_looks_for_the_maxima_again(gpu_backend):
    """Where the forward has not stored them, as under torch.compile."""
    x = inputs.features(1, 5, 9, 9, memory_format=torch.channels_last)
    x = laid_out(x, (0, 1, 9 * 8, 8)).requires_grad_()  # 16 bytes of the last pixel would go beyond
    boxes = torch.tensor([[0.0, 1, 1, 7, 8], [0, 0, 2, 9, 9]])
    out = pyzoo.ops.roi_pool(x, boxes, 3)
    grad_output = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, x, grad_output)
    actual = torch.ops.pyzoo._roi_pool_backward(grad_output, boxes, x.detach(), None, 1.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_stays_where_it_belongs(gpu_backend):
    x, boxes = torch.ones(1, 1, 8, 8, requires_grad=True), torch.tensor([[0.0, 0, 0, 4, 4]])
    out = pyzoo.ops.roi_align(x, boxes, 2, sampling_ratio=1)  # samples at (1, 1), (1, 3), (3, 1), (3, 3)
    grad_output = torch.tensor([[[[float("inf"), 1], [1, 1]]]])
    (grad,) = torch.autograd.grad(out, x, grad_output)
    assert grad[0, 0, 1, 1] == torch.inf
    assert (~grad.isfinite()).sum() == 1
    assert grad[grad.isfinite()].sum() == 3


@pytest.mark.parametrize("mask", ["A", "B"])
def test_a_color_gets_nothing_from_the_colors_after_it(mask, gpu_backend):
    """Not even NaN; and a gradient of the weight that is summed in parts."""
    ones = torch.ones(12, 6, 2, 3).index_fill(1, torch.tensor([4, 5]), torch.nan)
    image = torch.arange(1.0, 13)[:, None, None, None]
    x = (image * ones).requires_grad_()
    weight = torch.ones(6, 6, 1, 1, requires_grad=True)
    out = pyzoo.ops.masked_conv2d(x, weight, mask=mask, colors=3)
    grads = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    color = torch.arange(6) // 2
    sees = (color < color[:, None]) if mask == "A" else (color <= color[:, None])
    seen = torch.where(sees, ones[0, :, 0, 0], 0)
    torch.testing.assert_close(out, image * seen.sum(1)[:, None, None].expand_as(out), equal_nan=True)
    torch.testing.assert_close(grads[0], sees.sum(0)[:, None, None].expand_as(x).float())
    torch.testing.assert_close(grads[1][..., 0, 0], 6 * image.sum() * seen, equal_nan=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gram_matrix_of_several_tiles(layout, gpu_backend, poison):
    """Symmetric to the last bit, and a channel of NaN spoils its row and its column alone."""
    x = inputs.features(2, 140, 6, 7, memory_format=layout)
    expected = pyzoo.ops.gram_matrix_reference(x)
    gram = pyzoo.ops.gram_matrix(x)
    torch.testing.assert_close(gram, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(gram, gram.mT)
    x[1, 70, 3, 3] = torch.nan
    expected[1, 70, :] = expected[1, :, 70] = torch.nan
    torch.testing.assert_close(pyzoo.ops.gram_matrix(x), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_channel_sum(dtype, gpu_backend, poison):
    atol = 1e-11 if dtype == torch.float64 else 1e-4
    for shape in ((2, 5, 9, 11), (3, 70, 7, 1), (2, 3, 65, 66), (0, 3, 4, 4), (2, 0, 4, 4)):
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        last = x.contiguous(memory_format=torch.channels_last)
        for view in (x, last, torch.stack([x, x], -1)[..., 1], x[:, :, :1].expand(shape)):
            expected = view.double().sum((0, 2, 3)).to(dtype)
            torch.testing.assert_close(channel_sum(view), expected, rtol=torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_coupling(dtype, gpu_backend):
    half = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((), (5, 8), (0, 4, 3, 3), (2, 6, 20, 37), (3, 1, 2, 1, 2, 2)):
        base, update, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
        base, update, grad = base.to(half), update.to(dtype), grad.to(half)
        views = [lambda x: x.clone(), lambda x: torch.stack([x, x], -1)[..., 0], lambda x: apart(x, None)]
        if shape:
            views += [lambda x: apart(x, 0)]
        if len(shape) == 4:
            views += [lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[1]]
        for view in views:
            for other in views:
                x, u, g = view(base), other(update), view(grad)
                out = other(torch.zeros_like(x))
                assert coupling.couple(x, u, out) is out
                assert torch.equal(out, base + update.to(half))
                assert torch.equal(coupling.uncouple(view(base), u), base - update.to(half))
                rebuilt, summed = coupling.uncouple_with_grad(x, u, g, other(update))
                assert torch.equal(rebuilt, base - update.to(half))
                assert torch.equal(summed, grad + update.to(half))


def test_reversible_stack(gpu_backend):
    check_step(make_stack(2), make_input(3, 8, 9, 7))
