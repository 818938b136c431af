"""roi_align and roi_pool against torchvision's on random and degenerate input: values, maxima, gradients.

PYZOO_FUZZ=<count> sets the number of cases of each test; a failure names the seed that repeats it. Where torchvision's
result is not defined (it reads stray memory, overflows an int or raises), the reference in plain PyTorch and what is
documented, that a box with a non-finite side pools to zero, are checked instead.
"""

import math
import os

import pytest

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

from pyzoo import _C, ops  # noqa: E402
from pyzoo._backend import runs_on_core  # noqa: E402

COUNT = int(os.environ.get("PYZOO_FUZZ", "300"))
ISAS = [os.environ["PYZOO_CPU_ISA"]] if "PYZOO_CPU_ISA" in os.environ else _C.build_info()["isas"]
MANY_SAMPLES = 3000  # in one box; torchvision takes them one at a time


@pytest.fixture(autouse=True)
def _restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")


def pick(g, options):
    return options[int(torch.randint(len(options), (), generator=g))]


def below(g, n):
    return int(torch.randint(n, (), generator=g))


def random_features(g, dtype):
    images, channels = 1 + below(g, 3), pick(g, (1, 2, 3, 4, 7, 8, 16, 17, 33, 64))
    height, width = 1 + below(g, pick(g, (1, 5, 20, 50))), 1 + below(g, pick(g, (1, 5, 20, 50)))
    x = torch.randn(images, channels, height, width, generator=g, dtype=torch.float64)
    if pick(g, (0, 0, 1)):
        x = (x * 2).round()  # equal maxima, and -0
    return x.to(dtype)


def rearranged(g, x):
    """x in other memory: channels_last, transposed, every second element, expanded, or as it was."""
    layout = pick(
        g, ("contiguous", "contiguous", "channels_last", "channels_last", "transposed", "strided", "expanded")
    )
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return x.new_zeros([2 * s for s in x.shape])[(slice(None, None, 2),) * x.dim()].copy_(x)
    if layout == "expanded" and x.dim() == 4:
        return x[:, :1].expand_as(x)
    return x


def random_boxes(g, x, scale):
    """[K, 5] around the image that ``x`` is ``scale`` of."""
    images, _, height, width = x.shape
    n = below(g, pick(g, (1, 2, 10, 30)))
    size = torch.tensor([width, height], dtype=torch.float64) / scale
    corner = (torch.rand(n, 2, generator=g, dtype=torch.float64) * 1.6 - 0.3) * size
    extent = torch.rand(n, 2, generator=g, dtype=torch.float64) * size * pick(g, (0.01, 0.3, 1, 1, 3))
    boxes = torch.cat([corner, corner + extent], 1)
    if pick(g, (0, 0, 1)):
        boxes = (boxes * pick(g, (1, 2))).round() / pick(g, (1, 2))  # exactly on pixels, on the edge, of no size
    if n and pick(g, (0, 0, 1)):  # a few turned inside out
        where = torch.rand(n, generator=g) < pick(g, (0.2, 1.0))
        order = pick(g, ([2, 1, 0, 3], [0, 3, 2, 1], [2, 3, 0, 1], [0, 1, 0, 1]))
        boxes[where] = boxes[where][:, torch.tensor(order)]
    if n and pick(g, (0, 0, 0, 1)):  # a few broken coordinates
        where = torch.rand(n, 4, generator=g) < pick(g, (1 / n, 0.1, 0.5))
        odd = [0, -0.0, 1e-45, -1, width / scale, height / scale, 1e3, 1e6, -1e6, 1e9, 1e30, -1e30]
        odd = torch.tensor([*odd, math.inf, -math.inf, math.nan])
        boxes[where] = odd.double()[torch.randint(len(odd), (int(where.sum()),), generator=g)]
    image = torch.randint(images, (n, 1), generator=g).double()
    if pick(g, (0, 1)):
        image = image + pick(g, (0, 0.5, 0.99)) * (image >= 0)  # the index is cut off, not rounded
    return torch.cat([image, boxes], 1)


def random_case(seed):
    g = torch.Generator().manual_seed(seed)
    dtype = pick(g, (torch.float32, torch.float32, torch.float64))
    x = random_features(g, dtype)
    scale = pick(g, (1.0, 1.0, 0.5, 1 / 16, 0.3, 3.0))
    rois = random_boxes(g, x, scale).to(dtype)
    size = pick(g, ((1, 1), (2, 2), (3, 5), (7, 7), (14, 4)))
    torch.set_num_threads(pick(g, (1, 2, 4)))
    _C.set_isa(pick(g, ISAS))
    return g, rearranged(g, x), rearranged(g, rois), size, scale


def gradient(g, out):
    """The same whole numbers for both, whose sums are exact, in some layout; also all equal, as from a sum."""
    grad = torch.randint(-8, 8, out.shape, generator=g).to(out.dtype)
    if pick(g, (0, 0, 0, 1)):
        grad = torch.ones((), dtype=out.dtype).expand(out.shape)
    return rearranged(g, grad)


def describe(seed, x, rois, *rest):
    return f"{seed=} isa={_C.build_info()['isa']} x={list(x.shape)} {x.stride()} {x.dtype} rois={len(rois)} {rest}"


# ------------------------------------------------------------------------------------------------------------ roi_align


def sample_counts(rois, size, scale, sampling_ratio, aligned):
    """Samples of each box along y and x, as torchvision counts them; NaN for those it cannot."""
    low, high = rois[:, [2, 1]] * scale - 0.5 * aligned, rois[:, [4, 3]] * scale - 0.5 * aligned
    extent = high - low
    if not aligned:
        extent = extent.clamp(min=1)  # NaN stays
    counts = (
        torch.full_like(extent, sampling_ratio) if sampling_ratio > 0 else (extent / extent.new_tensor(size)).ceil()
    )
    return counts.where((low.isfinite() & extent.isfinite()).all(1, keepdim=True), math.nan)


def test_roi_align():
    for seed in range(COUNT):
        g, x, rois, size, scale = random_case(seed)
        sampling_ratio, aligned = pick(g, (-1, 0, 1, 2, 3, 5)), pick(g, (False, True))
        args = size, scale, sampling_ratio, aligned
        about = describe(seed, x, rois, *args)
        counts = sample_counts(rois, size, scale, sampling_ratio, aligned)
        # Counts of different sign make torchvision ask for a table of negative size.
        total = counts.prod(1) * size[0] * size[1]
        defined = (total >= 0) & (total <= MANY_SAMPLES) & (counts <= MANY_SAMPLES).all(1)  # false for NaN
        other = ~defined & (counts <= 1e5).all(1)
        empty = counts.isnan().any(1)
        tolerance = {"rtol": 2e-5, "atol": 2e-5} if x.dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}

        def check(got, want, about=about, rtol=tolerance["rtol"], atol=tolerance["atol"]):
            atol *= max(float(want.detach().abs().max()), 1.0) if want.numel() else 1.0
            torch.testing.assert_close(got.contiguous(), want, rtol=rtol, atol=atol, msg=lambda m: f"{about}\n{m}")

        ours, (theirs, plain) = x.detach().requires_grad_(), (x.clone().requires_grad_() for _ in range(2))
        out = ops.roi_align(ours, rois, *args)
        want = torchvision.ops.roi_align(theirs, rois[defined], *args)
        want_other = ops.roi_align_reference(plain, rois[other], *args)
        check(out[defined], want)
        check(out[other], want_other)
        assert out.isfinite().all(), about
        assert (out[empty] == 0).all(), about

        grad = gradient(g, out)
        grad = torch.where((defined | other | empty)[:, None, None, None], grad, 0)
        (got,) = torch.autograd.grad(out, ours, grad)
        (want,) = torch.autograd.grad(want, theirs, grad[defined])
        (want_other,) = torch.autograd.grad(want_other, plain, grad[other])
        try:
            check(got, (want + want_other).contiguous())
        except AssertionError:  # torchvision rounds after each of the many samples in one pixel; sums in float64 decide
            compared = defined | other
            exact = ops.roi_align_reference(plain, rois[compared], *args, dtype=torch.float64)
            (want,) = torch.autograd.grad(exact, plain, grad[compared].double())
            check(got, want.contiguous())


# ------------------------------------------------------------------------------------------------------------- roi_pool


def pooled_with_argmax(x, rois, size, scale):
    output = x.new_empty(len(rois), x.shape[1], *size)
    argmax = torch.empty_like(output, dtype=torch.int32)
    _C.roi_pool_fwd_cpu(x, rois, output, argmax, scale)
    return output, argmax


def test_roi_pool():
    for seed in range(COUNT):
        g, x, rois, size, scale = random_case(10**6 + seed)
        if pick(g, (0, 0, 0, 1)):
            odd = torch.tensor([math.nan, math.inf, -math.inf, -3e38, 0.0, -0.0], dtype=x.dtype)
            x = x.clone()
            where = torch.rand(x.shape, generator=g) < pick(g, (0.05, 0.9))
            x[where] = odd[torch.randint(len(odd), (int(where.sum()),), generator=g)]
        finite = rois.isfinite().all(1)
        defined = (rois[:, 1:] * scale).abs().amax(1) < 2**29  # else torchvision's int overflows; false for NaN
        about = describe(seed, x, rois, size, scale)

        want, want_argmax = torch.ops.torchvision.roi_pool(x, rois[defined], scale, *size)
        out, argmax = pooled_with_argmax(x, rois, size, scale)
        assert torch.equal(out[defined], want), about
        assert torch.equal(argmax[defined], want_argmax), about
        assert (out[~finite] == 0).all(), about
        assert (argmax[~finite] == -1).all(), about

        ours, theirs = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
        again = ops.roi_pool(ours, rois, size, scale)
        assert torch.equal(again.nan_to_num(), out.nan_to_num()), about
        grad = gradient(g, out)
        grad = torch.where(defined[:, None, None, None], grad, 0)
        pooled = torchvision.ops.roi_pool(theirs, rois[defined], size, scale)
        (want,) = torch.autograd.grad(pooled, theirs, grad[defined])
        (got,) = torch.autograd.grad(again, ours, grad)
        assert torch.equal(got, want), about  # sums of whole numbers are exact
        from_argmax = torch.empty_like(want)
        _C.roi_pool_bwd_argmax_cpu(grad, rois, argmax, from_argmax)
        assert torch.equal(from_argmax, want), about


@pytest.mark.skipif(not runs_on_core(torch.device("cpu")), reason="a kernel on a GPU cannot raise")
def test_image_index_out_of_range():
    x = torch.zeros(2, 3, 5, 5)
    for index in (-1.0, 2.0, 2.5, 1e9, -1e30, math.nan, math.inf):
        rois = torch.tensor([[0, 0, 0, 3, 3], [index, 0, 0, 3, 3]])
        for op in (ops.roi_align, ops.roi_pool):
            with pytest.raises(ValueError, match="batch index"):
                op(x, rois, 2)
