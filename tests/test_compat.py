"""pyzoo.compat against the published semantics of mmcv.ops and detectron2.layers, here as plain formulas."""

import inspect
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

from pyzoo.compat import detectron2_layers, mmcv_ops  # noqa: E402


def random_boxes(n, size=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * size
    return torch.cat([corner, corner + torch.rand(n, 2, generator=g) * size / 2], 1)


def random_scores(n, seed=1):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def random_rois(n, images=2, **kwargs):
    image = torch.arange(n) % images
    return torch.cat([image[:, None].float(), random_boxes(n, **kwargs)], 1)


def features(seed=2):
    return torch.randn(2, 3, 20, 30, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- mmcv: nms


def greedy_nms(boxes, scores, threshold, offset):
    """mmcv's loop, in NumPy float32."""
    x1, y1, x2, y2 = boxes.numpy().T
    one, threshold = np.float32(offset), np.float32(threshold)
    area = (x2 - x1 + one) * (y2 - y1 + one)
    order = scores.sort(descending=True, stable=True).indices.tolist()
    keep = []
    for j in order:
        for i in keep:
            w = max(np.float32(0), min(x2[i], x2[j]) - max(x1[i], x1[j]) + one)
            h = max(np.float32(0), min(y2[i], y2[j]) - max(y1[i], y1[j]) + one)
            if w * h / (area[i] + area[j] - w * h) > threshold:
                break
        else:
            keep.append(j)
    return keep


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_mmcv_nms(offset, threshold):
    boxes, scores = random_boxes(150), random_scores(150)
    boxes[:60] = boxes[:60].round()
    dets, keep = mmcv_ops.nms(boxes, scores, threshold, offset)
    assert keep.tolist() == greedy_nms(boxes, scores, threshold, offset)
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], 1)[keep])


def test_mmcv_nms_compares_in_float32():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 3.0]])  # overlap: float32(0.3), which is > 0.3
    scores = torch.tensor([0.9, 0.8])
    assert torchvision.ops.nms(boxes, scores, 0.3).tolist() == [0]
    assert mmcv_ops.nms(boxes, scores, 0.3)[1].tolist() == greedy_nms(boxes, scores, 0.3, 0) == [0, 1]


def test_mmcv_nms_score_threshold_and_max_num():
    boxes, scores = random_boxes(80), random_scores(80)
    all_kept = mmcv_ops.nms(boxes, scores, 0.3)[1]
    above = all_kept[scores[all_kept] > 0.4]
    assert mmcv_ops.nms(boxes, scores, 0.3, score_threshold=0.4)[1].tolist() == above.tolist()
    dets, keep = mmcv_ops.nms(boxes, scores, 0.3, 0, 0.4, 5)
    assert keep.tolist() == above[:5].tolist()
    assert dets.shape == (5, 5)
    assert mmcv_ops.nms(boxes, scores, 0.3, max_num=1000)[1].tolist() == all_kept.tolist()


def test_mmcv_nms_of_arrays_and_of_nothing():
    boxes, scores = random_boxes(20), random_scores(20)
    dets, keep = mmcv_ops.nms(boxes.numpy(), scores.numpy(), 0.3)
    assert isinstance(dets, np.ndarray)
    assert isinstance(keep, np.ndarray)
    assert keep.tolist() == mmcv_ops.nms(boxes, scores, 0.3)[1].tolist()
    dets, keep = mmcv_ops.nms(boxes[:0], scores[:0], 0.3)
    assert dets.shape == (0, 5)
    assert keep.shape == (0,)


@pytest.mark.parametrize("split_thr", [50, 10000])
@pytest.mark.parametrize("extra", [{}, {"max_num": 7}, {"score_threshold": 0.5}, {"offset": 1}])
def test_mmcv_batched_nms(split_thr, extra):
    boxes, scores = random_boxes(120), random_scores(120)
    idxs = torch.arange(120) % 4
    by_class = [(idxs == c).nonzero()[:, 0] for c in range(4)]
    options = {k: v for k, v in extra.items() if k != "max_num"}
    kept = torch.cat([m[mmcv_ops.nms(boxes[m], scores[m], 0.3, **options)[1]] for m in by_class])
    kept = kept[scores[kept].argsort(descending=True)][: extra.get("max_num")]
    cfg = {"type": "nms", "iou_threshold": 0.3, "split_thr": split_thr, **extra}
    dets, keep = mmcv_ops.batched_nms(boxes, scores, idxs, cfg)
    assert keep.tolist() == kept.tolist()
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], 1)[keep])
    assert "split_thr" in cfg  # the caller's dict stays as it was


def test_mmcv_batched_nms_options():
    boxes, scores, idxs = random_boxes(50), random_scores(50), torch.arange(50) % 3
    agnostic = mmcv_ops.nms(boxes, scores, 0.4)[1].tolist()
    assert mmcv_ops.batched_nms(boxes, scores, idxs, {"iou_thr": 0.4}, class_agnostic=True)[1].tolist() == agnostic
    cfg = {"iou_threshold": 0.4, "class_agnostic": True}
    assert mmcv_ops.batched_nms(boxes, scores, idxs, cfg)[1].tolist() == agnostic
    dets, keep = mmcv_ops.batched_nms(boxes, scores, idxs, None)
    assert keep.tolist() == scores.argsort(descending=True).tolist()
    assert torch.equal(dets[:, 4], scores[keep])
    assert mmcv_ops.batched_nms(boxes[:0], scores[:0], idxs[:0], {"iou_threshold": 0.4})[0].shape == (0, 5)


def test_mmcv_nms_refuses():
    boxes, scores = random_boxes(3), random_scores(3)
    with pytest.raises(ValueError, match="offset must be 0 or 1, got 2"):
        mmcv_ops.nms(boxes, scores, 0.3, offset=2)
    with pytest.raises(ValueError, match=r"nms_cfg\['type'\] must be 'nms', got 'soft_nms'"):
        mmcv_ops.batched_nms(boxes, scores, torch.zeros(3), {"type": "soft_nms", "iou_threshold": 0.3})


# ----------------------------------------------------------------------------------------------------------- mmcv: RoI


def test_mmcv_roi_align():
    x, rois = features(), random_rois(12)
    expected = torchvision.ops.roi_align(x, rois, (3, 4), 0.5, 0, True)
    torch.testing.assert_close(mmcv_ops.roi_align(x, rois, (3, 4), 0.5), expected)
    torch.testing.assert_close(mmcv_ops.RoIAlign((3, 4), 0.5, use_torchvision=True)(x, rois), expected)
    expected = torchvision.ops.roi_align(x, rois, 5, 1.0, 2, False)
    torch.testing.assert_close(mmcv_ops.roi_align(x, rois, 5, 1.0, 2, "avg", False), expected)
    torch.testing.assert_close(mmcv_ops.RoIAlign(5, 1.0, 2, aligned=False)(x, rois), expected)


def bilinear(plane, y, x):
    """The value of ``plane`` at (y, x): 0 outside [-1, H] x [-1, W]."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return plane.new_zeros(())
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    wy, wx = y - y0, x - x0
    top = plane[y0, x0] * (1 - wx) + plane[y0, x1] * wx
    bottom = plane[y1, x0] * (1 - wx) + plane[y1, x1] * wx
    return top * (1 - wy) + bottom * wy


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 3])
def test_mmcv_roi_align_max(aligned, ratio):
    x, rois, (bins_y, bins_x), scale = features().double(), random_rois(6).double(), (2, 3), 0.6

    def formula(x):
        out = x.new_zeros(len(rois), x.shape[1], bins_y, bins_x)
        for k, (image, *box) in enumerate(rois.tolist()):
            x1, y1, x2, y2 = (v * scale - 0.5 * aligned for v in box)
            w, h = ((x2 - x1), (y2 - y1)) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
            w, h = w / bins_x / ratio, h / bins_y / ratio  # of a sample
            for c in range(x.shape[1]):
                for p in range(bins_y):
                    for q in range(bins_x):
                        ys = [y1 + (p * ratio + i + 0.5) * h for i in range(ratio)]
                        xs = [x1 + (q * ratio + i + 0.5) * w for i in range(ratio)]
                        out[k, c, p, q] = torch.stack([bilinear(x[int(image), c], v, u) for v in ys for u in xs]).max()
        return out

    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = formula(inputs[0]), mmcv_ops.roi_align(inputs[1], rois, (bins_y, bins_x), scale, ratio, "max", aligned)
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_mmcv_roi_align_refuses():
    with pytest.raises(ValueError, match="pool_mode must be 'avg' or 'max', got 'sum'"):
        mmcv_ops.roi_align(features(), random_rois(2), 2, 1.0, 2, "sum")
    with pytest.raises(ValueError, match="pool_mode 'max' needs sampling_ratio > 0, got 0"):
        mmcv_ops.RoIAlign(2, pool_mode="max")(features(), random_rois(2))


def test_mmcv_roi_pool():
    x, scale, (bins_y, bins_x) = features(), 0.45, (3, 2)
    rois = random_rois(20)
    rois[:4, 1:] = torch.tensor([[0, 0, 9, 9], [-20, -3, 400, 5], [100, 100, 120, 120], [50, 40, 10, 20]])

    def formula(x):
        out = x.new_zeros(len(rois), x.shape[1], bins_y, bins_x)
        scale32 = np.float32(scale)
        for k, (image, *box) in enumerate(rois.numpy()):
            x1, y1, x2, y2 = box[0] * scale32, box[1] * scale32, (box[2] + 1) * scale32, (box[3] + 1) * scale32
            w, h = (x2 - x1) / np.float32(bins_x), (y2 - y1) / np.float32(bins_y)
            if w <= 0 or h <= 0:
                continue
            for p in range(bins_y):
                for q in range(bins_x):
                    rows = slice(max(math.floor(p * h + y1), 0), max(math.ceil((p + 1) * h + y1), 0))
                    columns = slice(max(math.floor(q * w + x1), 0), max(math.ceil((q + 1) * w + x1), 0))
                    pixels = x[int(image), :, rows, columns].flatten(1)
                    if pixels.numel():
                        out[k, :, p, q] = pixels.amax(1)
        return out

    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = formula(inputs[0]), mmcv_ops.roi_pool(inputs[1], rois, (bins_y, bins_x), scale)
    assert torch.equal(*outputs)
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert torch.equal(mmcv_ops.RoIPool((bins_y, bins_x), scale)(x, rois), outputs[1])


# --------------------------------------------------------------------------------------------------------- detectron2


def test_detectron2_roi():
    x, rois = features(), random_rois(12)
    torch.testing.assert_close(
        detectron2_layers.ROIAlign((3, 4), 0.5, 2)(x, rois), torchvision.ops.roi_align(x, rois, (3, 4), 0.5, 2, True)
    )
    torch.testing.assert_close(
        detectron2_layers.ROIAlign(3, 0.5, 0, aligned=False)(x, rois), torchvision.ops.roi_align(x, rois, 3, 0.5, 0)
    )
    torch.testing.assert_close(detectron2_layers.roi_align(x, rois, 3), torchvision.ops.roi_align(x, rois, 3))
    assert torch.equal(detectron2_layers.ROIPool(3, 0.5)(x, rois), torchvision.ops.roi_pool(x, rois, 3, 0.5))
    with pytest.raises(ValueError, match=r"rois must have shape \[K, 5\], got \[12, 4\]"):
        detectron2_layers.ROIAlign(3, 0.5, 0)(x, rois[:, 1:])


def test_detectron2_nms():
    boxes, scores, idxs = random_boxes(100), random_scores(100), torch.arange(100) % 3
    assert torch.equal(detectron2_layers.nms(boxes, scores, 0.3), torchvision.ops.nms(boxes, scores, 0.3))
    for b in (boxes, boxes.half()):
        expected = torchvision.ops.batched_nms(b.float(), scores, idxs, 0.3)
        assert torch.equal(detectron2_layers.batched_nms(b, scores, idxs, 0.3), expected)


# --------------------------------------------------------------------------------------------------------- signatures


MMCV_ROI_ALIGN = "spatial_scale=1.0, sampling_ratio=0, pool_mode='avg', aligned=True"


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (mmcv_ops.nms, "boxes, scores, iou_threshold, offset=0, score_threshold=0, max_num=-1"),
        (mmcv_ops.batched_nms, "boxes, scores, idxs, nms_cfg, class_agnostic=False"),
        (mmcv_ops.roi_align, f"input, rois, output_size, {MMCV_ROI_ALIGN}"),
        (mmcv_ops.RoIAlign, f"output_size, {MMCV_ROI_ALIGN}, use_torchvision=False"),
        (mmcv_ops.roi_pool, "input, rois, output_size, spatial_scale=1.0"),
        (mmcv_ops.RoIPool, "output_size, spatial_scale=1.0"),
        (detectron2_layers.ROIAlign, "output_size, spatial_scale, sampling_ratio, aligned=True"),
        (detectron2_layers.roi_align, "input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False"),
        (detectron2_layers.batched_nms, "boxes, scores, idxs, iou_threshold"),
        (detectron2_layers.ROIPool, "output_size, spatial_scale"),
    ],
)
def test_signatures(function, signature):
    parameters = inspect.signature(function).parameters.values()
    written = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert written == signature
