"""The compiled nms against torchvision's on random and degenerate input: the same indices in the same order, always.

PYZOO_FUZZ=<count> sets the number of cases of each test; a failure names the seed that repeats it.
"""

import math
import os

import pytest

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

from pyzoo import _C  # noqa: E402

COUNT = int(os.environ.get("PYZOO_FUZZ", "300"))
THRESHOLDS = (-0.1, 0.0, 1e-20, 1e-6, 0.05, 0.1, 0.3, *[0.5] * 3, 0.7, 0.9, 0.95, 0.999, 0.9999999, 1.0, 1.5, math.nan)
F32, F64 = torch.float32, torch.float64
DTYPES = ((F32, F32),) * 3 + (  # of boxes and scores
    (F64, F64),
    (F32, F64),
    (F64, torch.float16),
    (torch.float16, F32),
    (torch.bfloat16, torch.bfloat16),
)
ISAS = _C.build_info()["isas"]


@pytest.fixture(autouse=True)
def _restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _C.set_isa("")


def pick(g, options):
    return options[int(torch.randint(len(options), (), generator=g))]


def random_boxes(g, n, dtype, threshold):
    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    kind = pick(g, ("uniform", "clusters", "scales", "thin", "grid", "nested", "same", "sparse", "brink", "brink"))
    corner, size = rand(n, 2) * pick(g, (1, 50, 1000, 1e5)), 1 + rand(n, 2) * pick(g, (1, 30, 300))
    if kind == "clusters":
        k = pick(g, (1, 5, 50))
        which = torch.randint(k, (n,), generator=g)
        size = (rand(k, 2) * 3 + 3).exp()[which] * (normal(n, 2) * 0.2).exp()
        corner = (rand(k, 2) * 800)[which] + normal(n, 2) * size * pick(g, (0.01, 0.1, 0.5)) - size / 2
    elif kind == "scales":
        size = torch.exp(rand(n, 2) * pick(g, (3, 10, 30)) - pick(g, (0, 5, 15)))
    elif kind == "thin":
        size = size * torch.tensor(pick(g, ([1, 1e-3], [1e-3, 1], [100, 1])), dtype=torch.float64)
    elif kind == "grid":
        i = torch.arange(n)
        corner, size = (
            torch.stack([i % 40, i // 40], 1) * 10.0,
            torch.full((n, 2), pick(g, (9.0, 10.0, 15.0, 31.0)), dtype=torch.float64),
        )
    elif kind == "nested":
        corner = torch.arange(n, dtype=torch.float64)[torch.randperm(n, generator=g), None].expand(n, 2) * 0.5
        size = 2.0 * n - 2 * corner
    elif kind == "same":
        corner, size = corner[:1].expand(n, 2) + rand(n, 2) * pick(g, (0, 0.1, 1)), size[:1].expand(n, 2)
    elif kind == "sparse":
        corner = corner * 100
    elif kind == "brink":  # pairs that overlap a little more than the threshold, far apart
        t, more = threshold if 0 < threshold < 1 else 0.5, 1 + pick(g, (1e-6, 1e-4, 1e-2))
        i = torch.arange(n) // 2
        corner = torch.stack([i % 40, i // 40], 1) * 1000 + (rand(n, 2) * 300)[i]
        size = (10 + rand(n, 2) * 290)[i if pick(g, (False, True)) else i * 0]
        axis, second = int(torch.randint(2, (), generator=g)), i * 2 != torch.arange(n)
        if pick(g, (False, True)):  # moved along an axis
            corner[second, axis] += size[second, axis] * (1 - t) / (1 + t) / more
        else:  # narrower
            narrow = size[second, axis] * t * more
            corner[second, axis] += (size[second, axis] - narrow) * rand(len(narrow))
            size[second, axis] = narrow
    boxes = torch.cat([corner, corner + size], 1)

    if pick(g, (0, 0, 1)):  # ties and exact touching
        step = pick(g, (0.25, 1, 8))
        boxes = (boxes / step).round() * step
    boxes = boxes * pick(g, (1,) * 8 + (-1, 1e-3, 1e-8, 1e-20, 1e-30, 1e7, 1e17, 1e30)) + pick(
        g, (0,) * 5 + (1e4, 1e7, -1e7)
    )
    boxes = boxes.to(dtype)
    odd = torch.tensor([0, -0.0, 1e-45, 1e-38, 3e38, 1e20, float("inf"), float("-inf"), float("nan")]).to(dtype)
    if n and pick(g, (0, 0, 0, 1)):  # a few broken coordinates
        where = rand(n, 4) < pick(g, (1 / n, 0.01, 0.5))
        boxes[where] = odd[torch.randint(len(odd), (int(where.sum()),), generator=g)]
    if pick(g, (0, 0, 0, 1)):  # a few boxes turned inside out
        where = rand(n) < pick(g, (0.1, 1.0))
        boxes[where] = boxes[where][:, torch.tensor(pick(g, ([2, 1, 0, 3], [0, 3, 2, 1], [2, 3, 0, 1], [0, 1, 0, 3])))]
    return boxes


def random_scores(g, n, dtype):
    scores = torch.rand(n, generator=g, dtype=torch.float64) * 2 - pick(g, (0, 1))
    if pick(g, (0, 1)):
        scores = (scores * 8).round() / pick(g, (8, -8))  # ties, and -0
    scores = scores.to(dtype)
    if n and pick(g, (0, 0, 1)):
        odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45]).to(dtype)
        where = torch.rand(n, generator=g) < 0.1
        scores[where] = odd[torch.randint(len(odd), (int(where.sum()),), generator=g)]
    return scores


def rearranged(g, x):
    """x in other memory: transposed, every second element, or as it was."""
    layout = pick(g, (0, 0, 1, 2))
    if layout == 1:
        return x.t().contiguous().t()
    if layout == 2:
        wide = x.new_zeros(*(2 * s for s in x.shape))
        view = wide[(slice(None, None, 2),) * x.dim()]
        return view.copy_(x)
    return x


def random_case(seed):
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(pick(g, (2, 20, 300, 1000, 3000)), (), generator=g))
    boxes_dtype, scores_dtype = pick(g, DTYPES)
    threshold = pick(g, THRESHOLDS)
    boxes, scores = random_boxes(g, n, boxes_dtype, threshold), random_scores(g, n, scores_dtype)
    torch.set_num_threads(pick(g, (1, 2, 4)))
    _C.set_isa(pick(g, ISAS))
    return g, rearranged(g, boxes), rearranged(g, scores), threshold


def kept(boxes, scores, threshold, idxs=None, size=None, shift=False):
    keep = torch.full((len(boxes) if size is None else size,), -7)
    count = _C.nms_cpu(boxes, scores, idxs, threshold, keep, shift)
    assert (keep[count:] == -1).all()
    return keep[:count]


def expected(boxes, scores, threshold):
    """torchvision's nms, which knows one dtype at a time: the scores enter as their ranks."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).contiguous()
    order = scores.sort(descending=True, stable=True).indices
    ranks = torch.empty(len(boxes), dtype=boxes.dtype)
    ranks[order] = -torch.arange(len(boxes), dtype=boxes.dtype)
    return torchvision.ops.nms(boxes, ranks, threshold)


def expected_by_class(boxes, scores, idxs, threshold):
    found = torch.zeros(len(boxes), dtype=torch.bool)
    for i in idxs.unique():
        members = (idxs == i).nonzero()[:, 0]
        found[members[expected(boxes[members], scores[members], threshold)]] = True
    found = found.nonzero()[:, 0]
    return found[scores[found].sort(descending=True, stable=True).indices]


def test_nms():
    for seed in range(COUNT):
        g, boxes, scores, threshold = random_case(seed)
        want = expected(boxes, scores, threshold)
        size = pick(g, (None, None, 0, 1, len(want) // 2, len(boxes) + 3))
        got = kept(boxes, scores, threshold, size=size)
        assert torch.equal(got, want[:size]), f"{seed=} {threshold=} {boxes.shape} {boxes.dtype}"


def test_nms_equal_scores_like_torchvision():
    for seed in range(COUNT // 3):
        _, boxes, scores, threshold = random_case(seed)
        if boxes.dtype == scores.dtype and boxes.dtype.itemsize >= 4:
            assert torch.equal(kept(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold)), (
                f"{seed=}"
            )


def test_batched_nms():
    for seed in range(COUNT):
        g, boxes, scores, threshold = random_case(10**6 + seed)
        classes = pick(g, (1, 2, 10, 80, 10**4))
        idxs = rearranged(g, torch.randint(classes, (len(boxes),), generator=g) - pick(g, (0, 3)))
        if classes == 2:
            idxs = idxs * (2**63 - 1)
        if classes <= 80:
            want = expected_by_class(boxes, scores, idxs, threshold)
            size = pick(g, (None, None, 1, len(want) // 2))
            got = kept(boxes, scores, threshold, idxs, size=size)
            assert torch.equal(got, want[:size]), f"{seed=} {threshold=} {boxes.shape} {boxes.dtype}"

        wide = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
        if len(boxes):
            wide = wide + (idxs.to(wide) * (wide.max() + 1))[:, None]
        want = expected(wide, scores, threshold)
        got = kept(boxes, scores, threshold, idxs, shift=True)
        assert torch.equal(got, want), f"shifted {seed=} {threshold=} {boxes.shape} {boxes.dtype}"


def test_batch_dimension():
    for seed in range(COUNT // 5):
        g, boxes, scores, threshold = random_case(2 * 10**6 + seed)
        batch = int(torch.randint(5, (), generator=g))
        boxes = (
            torch.stack([boxes.roll(i, 0) * (1 + i) for i in range(batch)])
            if batch
            else boxes.new_empty(0, *boxes.shape)
        )
        scores = (
            torch.stack([scores.roll(i * i, 0) for i in range(batch)]) if batch else scores.new_empty(0, *scores.shape)
        )
        idxs = pick(g, (None, torch.randint(7, scores.shape, generator=g)))
        shift = pick(g, (False, True))
        size = int(torch.randint(boxes.shape[1] + 2, (), generator=g))
        keep = torch.full((batch, size), -7)
        counts = _C.nms_cpu(boxes, scores, idxs, threshold, keep, shift)
        assert len(counts) == batch
        for b in range(batch):
            want = kept(boxes[b], scores[b], threshold, None if idxs is None else idxs[b], size=size, shift=shift)
            assert torch.equal(keep[b, : counts[b]], want), f"{seed=} {b=}"
            assert (keep[b, counts[b] :] == -1).all()


def test_many_boxes_and_threads():
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        corner = torch.rand(20000, 2, generator=g) * 800
        boxes, scores = (
            torch.cat([corner, corner + 1 + 99 * torch.rand(20000, 2, generator=g)], 1),
            torch.rand(20000, generator=g),
        )
        found = []
        for isa in ISAS:
            _C.set_isa(isa)
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                found.append(kept(boxes, scores, 0.5))
        assert all(torch.equal(f, found[0]) for f in found)
        assert torch.equal(found[0][:2000], torchvision.ops.nms(boxes, scores, 0.5)[:2000])


BOXES, SCORES, IDXS, KEEP = (
    torch.zeros(3, 4),
    torch.zeros(3),
    torch.zeros(3, dtype=torch.int64),
    torch.zeros(3, dtype=torch.int64),
)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((BOXES[0], SCORES, None, KEEP), r"boxes must have shape \[N, 4\] or \[B, N, 4\], got \[4\]"),
        ((BOXES[:, :3], SCORES, None, KEEP), r"boxes must have shape .*, got \[3, 3\]"),
        ((IDXS[:, None].expand(3, 4), SCORES, None, KEEP), "boxes must be float.*got int64"),
        ((BOXES, SCORES[:2], None, KEEP), r"scores must have shape \[N\] for boxes of shape \[3, 4\], got \[2\]"),
        ((BOXES, SCORES[None], None, KEEP), r"scores must have shape \[N\]"),
        ((BOXES, IDXS, None, KEEP), "scores must be float.*got int64"),
        ((BOXES, SCORES, IDXS[:1], KEEP), r"idxs must have shape \[N\]"),
        ((BOXES, SCORES, SCORES, KEEP), "idxs must be int64, got float32"),
        ((BOXES, SCORES, None, SCORES), "keep must be int64, got float32"),
        ((BOXES, SCORES, None, KEEP[None]), r"keep must have shape \[M\]"),
        ((BOXES[None], SCORES[None], None, KEEP[None].expand(2, 3)), r"keep must have shape \[B, M\]"),
        (
            (BOXES[:1].expand(2**29, 4), SCORES[:1].expand(2**29), None, KEEP),
            r"boxes must have fewer than 2\^31 elements",
        ),
    ],
)
def test_bad_input(args, message):
    boxes, scores, idxs, keep = args
    with pytest.raises(ValueError, match=message):
        _C.nms_cpu(boxes, scores, idxs, 0.5, keep, False)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [127, 128, 511, 512, 4095, 4096, 9000])
def test_order_of_scores_that_differ_in_their_last_bits(n, dtype):
    g = torch.Generator().manual_seed(n)
    for different in (2, 100, 10**6):
        scores = 0.5 + torch.randint(different, (n,), generator=g).to(dtype) * torch.finfo(dtype).eps
        scores[n // 2] = -1e30  # so that the leading bits vary, too
        boxes = torch.zeros(n, 4, dtype=dtype)  # the overlap is NaN: all are kept
        assert torch.equal(kept(boxes, scores, 0.5), scores.sort(descending=True, stable=True).indices)
