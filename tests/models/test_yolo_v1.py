"""YOLO v1: its networks, its loss against the rules written out, what it detects, and darknet's files."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import pyzoo
from pyzoo.models import model_entry
from pyzoo.models.darknet import load_weights, save_weights
from pyzoo.models.yolo_v1 import NETWORKS, LocallyConnected2d, YOLOv1, combine, decode, encode, pretraining_net
from pyzoo.reproduce.yolo_v1 import error_types

NAMES = list(NETWORKS)


def make(name: str = "yolo_v1_fast", **kwargs) -> YOLOv1:
    return pyzoo.create_model(name, **{**model_entry(name).tiny, **kwargs})


def make_grid(grid: int = 4, classes: int = 3, boxes: int = 2, **kwargs) -> YOLOv1:
    """A net of one small convolution, for what is said of its outputs."""
    return YOLOv1([(3, 2), "pool"], num_classes=classes + 1, boxes=boxes, image_size=2 * grid, **kwargs)


def target(*objects: tuple) -> dict[str, torch.Tensor]:
    """Of (x1, y1, x2, y2, label)."""
    table = torch.tensor(objects, dtype=torch.float64).reshape(-1, 5)
    return {"boxes": table[:, :4], "labels": table[:, 4].long()}


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("name", "conv_parameters", "macs", "outputs"),
    [
        ("yolo_v1", 60_155_968, 20_285_153_280, 1470),
        ("yolo_v1_fast", 25_168_800, 2_418_728_960, 1470),
        ("yolo_v1_small", 60_155_968, 20_107_419_648, 1470),
        ("yolo_v1_tiny", 8_654_224, 1_608_015_360, 1470),
        ("yolo_v1_local", 60_169_152, 20_210_729_728, 1715),
    ],
)
def test_sizes(name, conv_parameters, macs, outputs):
    with torch.device("meta"):
        model = pyzoo.create_model(name).eval()
        counted = []

        def count(module, _, out):
            counted.append(module.weight.numel() * (out[0, 0].numel() if isinstance(module, nn.Conv2d) else 1))

        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, LocallyConnected2d)):
                module.register_forward_hook(count)
        assert model(torch.empty(1, 3, 448, 448)).shape == (1, outputs)
    assert sum(p.numel() for p in model.features.parameters()) == conv_parameters
    assert sum(counted) == macs
    assert model.grid == 7


def test_maps():
    """The sides of the maps of the full network, and of the shallow ones."""
    for name, sides in (("yolo_v1", [224, 112, 56, 28, 14, 7]), ("yolo_v1_fast", [448, 224, 112, 56, 28, 14, 7])):
        with torch.device("meta"):
            x, seen = torch.empty(1, 3, 448, 448), []
            for layer in pyzoo.create_model(name).features:
                x = layer(x)
                if x.shape[2] not in seen:
                    seen.append(x.shape[2])
        assert seen == sides


def test_pretraining():
    """What ImageNet trains first is the first 20 convolutions of the detector themselves."""
    model = make("yolo_v1")
    net = pretraining_net(model, num_classes=7)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20
    assert convolutions[-1] is model.features[-5].conv
    assert net(torch.rand(2, 3, 64, 96)).shape == (2, 7)
    with pytest.raises(ValueError, match="layers"):
        pretraining_net(make("yolo_v1_tiny"), layers=99)


def test_locally_connected_is_a_convolution_at_each_place():
    torch.manual_seed(0)
    layer = LocallyConnected2d(3, 4, 5).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 5, 5).double()
    out = layer(x)
    for place in range(25):
        y, column = divmod(place, 5)
        everywhere = nn.functional.conv2d(x, layer.weight[place].view(4, 3, 3, 3), padding=1)
        torch.testing.assert_close(out[:, :, y, column], everywhere[:, :, y, column] + layer.bias[:, y, column])


@pytest.mark.parametrize("name", ["yolo_v1_fast", "yolo_v1_local"])
def test_compiles_and_exports(name):
    torch.manual_seed(0)
    model = make(name, image_size=64).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(
            model, (x, None), dynamic_shapes={"images": {0: torch.export.Dim("n")}, "targets": None}
        )
        torch.testing.assert_close(exported.module()(x[:1], None), expected[:1])
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_stretches_as_darknet():
    """Corners stay where they are; between them as darknet's resize_image has it, first along x and then along y."""
    torch.manual_seed(0)
    image = torch.rand(3, 5, 9).double()

    def resize(x, size):  # the last axis
        scale = (x.shape[-1] - 1) / (size - 1)
        columns = []
        for i in range(size):
            left = min(int(i * scale), x.shape[-1] - 2)
            share = i * scale - left
            columns.append((1 - share) * x[..., left] + share * x[..., left + 1])
        return torch.stack(columns, -1)

    expected = resize(resize(image, 8).mT, 8).mT
    torch.testing.assert_close(make_grid().double().stretch([image, image])[1], expected)
    assert make_grid().stretch([torch.rand(3, 1, 1)]).shape == (1, 3, 8, 8)


# ----------------------------------------------------------------------------------------------------------------- loss


def loss_by_the_rules(model: YOLOv1, output, targets, sizes, order):
    """Section 2.2, cell by cell."""
    s, b, c = model.grid, model.boxes, model.num_classes - 1
    total = {"loss_box": 0, "loss_object": 0, "loss_no_object": 0, "loss_classes": 0}
    objects = [(i, j) for i, t in enumerate(targets) for j in range(len(t["boxes"]))]
    for i in range(len(targets)):
        out = output[i]
        height, width = sizes[i]
        cells = {}
        for image, j in (objects[k] for k in order):
            if image != i:
                continue
            x1, y1, x2, y2 = targets[i]["boxes"][j].tolist()
            x1, x2 = (min(max(x, 0), width) / width for x in (x1, x2))
            y1, y2 = (min(max(y, 0), height) / height for y in (y1, y2))
            if x2 - x1 >= 0.005 and y2 - y1 >= 0.005:
                cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
                cell = math.floor(cy * s), math.floor(cx * s)
                cells.setdefault(cell, (cx, cy, x2 - x1, y2 - y1, int(targets[i]["labels"][j]) - 1))
        for row in range(s):
            for column in range(s):
                cell = row * s + column
                confidence = out[s * s * c :][cell * b : cell * b + b]
                boxes = out[s * s * (c + b) :][cell * b * 4 : (cell + 1) * b * 4].view(b, 4)
                if (row, column) not in cells:
                    total["loss_no_object"] += 0.5 * (confidence**2).sum()
                    continue
                cx, cy, w, h, label = cells[row, column]
                overlaps, distances = [], []
                for x, y, rw, rh in boxes.tolist():
                    px, py, pw, ph = (x + column) / s, (y + row) / s, rw**2, rh**2
                    iw = min(px + pw / 2, cx + w / 2) - max(px - pw / 2, cx - w / 2)
                    ih = min(py + ph / 2, cy + h / 2) - max(py - ph / 2, cy - h / 2)
                    both = iw * ih if iw > 0 and ih > 0 else 0
                    overlaps.append(both / (pw * ph + w * h - both))
                    distances.append(math.dist((px, py, pw, ph), (cx, cy, w, h)))
                best = overlaps.index(max(overlaps)) if max(overlaps) > 0 else distances.index(min(distances))
                wanted = output.new_tensor([cx * s - column, cy * s - row, w**0.5, h**0.5])
                total["loss_box"] += 5 * ((boxes[best] - wanted) ** 2).sum()
                total["loss_object"] += (confidence[best] - overlaps[best]) ** 2
                for j in range(b):
                    if j != best:
                        total["loss_no_object"] += 0.5 * confidence[j] ** 2
                for k in range(c):
                    total["loss_classes"] += (out[cell * c + k] - float(k == label)) ** 2
    return {name: torch.as_tensor(value) / len(targets) for name, value in total.items()}


SIZES = [(30, 50), (64, 64), (10, 20)]
TARGETS = [
    # The first two have their centres in one cell; one is on the border of two cells; one is tiny; one mostly outside
    target((3, 3, 9, 8, 1), (2, 2, 12, 9, 3), (20, 10, 30, 20, 2), (40, 25, 40.2, 29, 1), (45, -9, 90, 4, 2)),
    target((0, 0, 64, 64, 3), (8, 8, 24, 24, 1)),
    target(),
]


@pytest.mark.parametrize("boxes", [1, 2, 3])
def test_loss(boxes):
    model = make_grid(boxes=boxes)
    both = 0
    for seed in range(20):
        torch.manual_seed(seed)
        # Small boxes far from their cells, so that in some cells none overlaps the object
        output = torch.randn(3, sum(model.parts), dtype=torch.float64) * (0.2 if seed % 2 else 1)
        output.requires_grad_()
        torch.manual_seed(seed)
        actual = model.losses(output, TARGETS, SIZES)
        torch.manual_seed(seed)
        expected = loss_by_the_rules(model, output, TARGETS, SIZES, torch.randperm(7).tolist())
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        gradients = [torch.autograd.grad(sum(loss.values()), output)[0] for loss in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
        torch.manual_seed(seed)
        labels = model.assign(TARGETS, SIZES)[3]
        both += 2 in labels.tolist()[:1]
    assert 0 < both < 20  # either object of the contested cell was chosen at times


def test_loss_chooses_the_nearest_if_none_overlaps():
    model = make_grid()
    output = torch.zeros(1, sum(model.parts), dtype=torch.float64)
    _, confidences, boxes = model.split(output)
    confidences[:] = 1
    boxes[0, 0, 0, 0] = torch.tensor([3, 3, 0.1, 0.1])  # the object is at 0.5, 0.5
    boxes[0, 0, 0, 1] = torch.tensor([0.5, 3, 0.1, 0.1])
    losses = model.losses(output, [target((0, 0, 8, 8, 1))], [(32, 32)])
    torch.testing.assert_close(losses["loss_box"].item(), 5 * (2.5**2 + 2 * 0.4**2))
    boxes[0, 0, 0, 0] = torch.tensor([0.3, 0.5, 0.1, 0.1])
    losses = model.losses(output, [target((0, 0, 8, 8, 1))], [(32, 32)])
    torch.testing.assert_close(losses["loss_box"].item(), 5 * (0.2**2 + 2 * 0.4**2))


def test_confidence_learns_and_its_target_is_constant():
    model = make_grid()
    output = torch.rand(1, sum(model.parts), dtype=torch.float64).requires_grad_()
    loss = model.losses(output, [target((0, 0, 20, 16, 1))], [(32, 32)])
    (gradient,) = torch.autograd.grad(loss["loss_object"], output)
    classes, confidences, boxes = model.split(gradient)
    assert boxes.abs().max() == classes.abs().max() == 0
    assert confidences.count_nonzero() == 1


def test_half_the_loss_has_darknets_gradient():
    """Which is 0.5 * confidence where there is no object, summed over the batch."""
    for half, expected in ((True, 0.5), (False, 1.0)):
        model = make_grid(half=half)
        output = torch.ones(2, sum(model.parts)).requires_grad_()
        loss = sum(model.losses(output, [target(), target()], [(32, 32)] * 2).values())
        (gradient,) = torch.autograd.grad(2 * loss, output)
        classes, confidences, boxes = model.split(gradient)
        assert (confidences == expected).all()
        assert classes.abs().max() == boxes.abs().max() == 0


def test_decode_inverts_encode():
    torch.manual_seed(0)
    boxes = torch.rand(200, 4).double()
    boxes[:4, :2] = torch.tensor([[0, 0], [1, 1], [3 / 7, 5 / 7], [1, 0]])
    cell, coordinates = encode(boxes, 7)
    assert cell.min() == 0
    assert cell.max() == 6
    torch.testing.assert_close(decode(coordinates, cell, 7), boxes)


# ------------------------------------------------------------------------------------------------------------ inference


def output_for(model: YOLOv1, targets, sizes) -> torch.Tensor:
    """What the network would say if it knew."""
    output = torch.zeros(len(targets), sum(model.parts), dtype=torch.float64)
    classes, confidences, boxes = model.split(output)  # views
    index, cell, wanted, label = model.assign(targets, sizes)
    image, (column, row) = index // model.grid**2, cell.long().T
    classes[image, row, column, label] = 0.9
    confidences[image, row, column, 1] = 0.8
    boxes[image, row, column, 1] = wanted
    return output


def test_detects_what_was_encoded():
    model = make_grid(grid=7)
    targets = [target((5, 3, 25, 13, 2), (30.5, 10, 50, 29, 1)), target((0, 0, 64, 60, 3)), target()]
    output = output_for(model, targets, SIZES)
    for found, wanted in zip(model.detect(output, SIZES), targets, strict=True):
        order = found["boxes"][:, 0].argsort()
        torch.testing.assert_close(found["boxes"][order], wanted["boxes"])
        assert found["labels"][order].tolist() == wanted["labels"].tolist()
        torch.testing.assert_close(found["scores"], torch.full_like(found["scores"], 0.72))
    grid = model.as_grid(output)
    assert grid.shape == (3, 7, 7, 13)
    # The first object is 20 x 10 around (15, 8) of 50 x 30: the cell in row 1 and column 2
    wanted = torch.tensor([15 / 50 * 7 - 2, 8 / 30 * 7 - 1, 0.4**0.5, 3**-0.5, 0.8, 0, 0.9, 0], dtype=torch.float64)
    torch.testing.assert_close(grid[0, 1, 2, 5:], wanted)


def test_one_class_a_cell():
    """Two objects with their centres in one cell: at most one of them is found, however well the network learned."""
    model = make_grid()
    targets = [target((1, 1, 7, 7, 1), (0, 0, 6, 6, 2))]
    for seed in range(5):
        torch.manual_seed(seed)
        (found,) = model.detect(output_for(model, targets, [(32, 32)]), [(32, 32)])
        assert len(set(found["labels"].tolist()) & {1, 2}) == 1


def test_detect_against_torchvision():
    torch.manual_seed(0)
    model = make_grid(grid=7, classes=5, score_threshold=0.3)
    output = torch.rand(2, sum(model.parts)) * 1.2
    boxes, scores = model.decode(output)
    for i, (height, width) in enumerate(SIZES[:2]):
        box, label = (scores[i] > 0.3).nonzero().unbind(1)
        corners = boxes[i][box]
        kept = [
            index
            for k in range(5)
            for index in (label == k).nonzero()[:, 0][
                torchvision.ops.nms(corners[label == k], scores[i][box, label][label == k], 0.5)
            ]
        ]
        kept = torch.stack(kept)
        kept = kept[scores[i][box, label][kept].argsort(descending=True, stable=True)]
        kept = kept[torchvision.ops.box_area(corners[kept].clamp(0, 1)) > 0]
        expected = torchvision.ops.clip_boxes_to_image(
            corners[kept] * torch.tensor([width, height] * 2), (height, width)
        )
        found = model.detect(output, SIZES[:2])[i]
        assert len(kept) > 20
        torch.testing.assert_close(found["scores"], scores[i][box, label][kept])
        torch.testing.assert_close(found["boxes"], expected)
        assert found["labels"].tolist() == (label[kept] + 1).tolist()


def test_detections_lie_in_the_image():
    model = make_grid(grid=4, score_threshold=0.0)
    torch.manual_seed(0)
    (found,) = model.detect(torch.randn(1, sum(model.parts)) * 2, [(30, 50)])
    boxes = found["boxes"]
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= torch.tensor([50, 30])).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    (nothing,) = model.detect(torch.zeros(1, sum(model.parts)), [(30, 50)])
    assert [tuple(nothing[key].shape) for key in ("boxes", "labels", "scores")] == [(0, 4), (0,), (0,)]


def test_combine():
    rcnn = {
        **target((0, 0, 10, 10, 1), (0, 0, 10, 10, 2), (50, 50, 60, 60, 1)),
        "scores": torch.tensor([0.5, 0.6, 0.7]),
    }
    yolo = {**target((0, 0, 10, 8, 1), (0, 0, 10, 9, 1), (50, 50, 60, 54, 1)), "scores": torch.tensor([0.9, 0.5, 0.8])}
    combined = combine(rcnn, yolo)
    torch.testing.assert_close(combined["scores"], torch.tensor([0.95, 0.7, 0.6], dtype=torch.float64))
    assert combined["labels"].tolist() == [1, 1, 2]
    nothing = {**target(), "scores": torch.zeros(0)}
    assert combine(rcnn, nothing)["scores"].tolist() == rcnn["scores"].tolist()
    assert len(combine(nothing, yolo)["boxes"]) == 0


# -------------------------------------------------------------------------------------------------------- darknet files


@pytest.mark.parametrize("name", NAMES)
def test_weights_round_trip(name, tmp_path):
    torch.manual_seed(0)
    model, other = make(name), make(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var)
    save_weights(model, tmp_path / "a.weights", seen=2**40)
    values = sum(t.numel() for t in [*model.parameters(), *model.buffers()] if t.is_floating_point())
    assert (tmp_path / "a.weights").stat().st_size == 20 + 4 * values
    assert load_weights(other, tmp_path / "a.weights") == 2**40
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=0)


def net_and_values(version=(0, 2, 0), seen="<q", fc_transposed=False):
    """A net of a convolution with batch norm, a locally connected layer and two linear ones; and its file, by hand."""
    torch.manual_seed(0)
    model = YOLOv1([(3, 2), "pool"], [("local", 3), "leaky", ("fc", 5)], batch_norm=True, num_classes=2, image_size=4)
    rng = np.random.default_rng(0)
    conv, bn = model.features[0].conv, model.features[0].bn
    local, first, last = model.head[0], model.head[3], model.head[4]
    data = struct.pack("<3i", *version) + struct.pack(seen, 7)
    wanted = []
    for tensor in (bn.bias, bn.weight, bn.running_mean, bn.running_var, conv.weight, local.bias, local.weight):
        wanted.append((tensor, rng.random(tensor.shape, dtype=np.float32)))
        data += wanted[-1][1].tobytes()
    for linear in (first, last):
        for tensor in (linear.bias, linear.weight):
            wanted.append((tensor, rng.random(tensor.shape, dtype=np.float32)))
            data += (wanted[-1][1].T if fc_transposed else wanted[-1][1]).tobytes()
    return model, data, wanted


@pytest.mark.parametrize(
    ("version", "seen", "argument", "fc_transposed"),
    [
        ((0, 2, 0), "<q", None, False),
        ((1, 0, 0), "<q", None, False),
        ((0, 1, 0), "<i", True, True),
        ((0, 0, 1), "<i", False, False),
        ((1001, 1, 0), "<i", None, True),
        ((0, 1001, 0), "<i", None, True),
        ((0, 2, 0), "<q", True, True),
    ],
)
def test_reads_files(version, seen, argument, fc_transposed, tmp_path):
    model, data, wanted = net_and_values(version, seen, fc_transposed)
    (tmp_path / "a").write_bytes(data)
    assert load_weights(model, tmp_path / "a", fc_transposed=argument) == 7
    for tensor, values in wanted:
        np.testing.assert_array_equal(tensor.detach().numpy(), values)


def corrupt(data: bytes, at: int, value: float) -> bytes:
    return data[:at] + struct.pack("<f", value) + data[at + 4 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "header takes 16 bytes or more, the file has 0"),
        (lambda data: data[:11], "header takes 16 bytes or more, the file has 11"),
        (lambda data: data[:15], "header takes 20 bytes, the file has 15"),
        (lambda data: data[:20], r"too short: layer features\.0 takes bytes 20 to 268, the file has 20"),
        (lambda data: data[:-1], r"too short: layer head\.4 takes bytes \d+ to (\d+), the file has \d+"),
        (lambda data: data[:400], r"too short: layer head\.0 takes bytes 268 to 1180, the file has 400"),
        (lambda data: data + b"x", r"too long: the last layer, head\.4, ends at byte \d+, the file has 1 more"),
        (lambda data: struct.pack("<i", -1) + data[4:], r"\(bytes 0 to 12\) says version -1\.2\.0"),
        (lambda data: b"PK\3\4" + data[4:], "header|too|fc_transposed"),
        (lambda data: data[:12] + struct.pack("<q", -5) + data[20:], r"\(bytes 12 to 20\) says -5 images"),
        (lambda data: struct.pack("<3i", 0, 1, 0) + data[12:], r"version 0\.1 does not say .* fc_transposed must be"),
        (lambda data: corrupt(data, 20, math.nan), r"layer features\.0: biases \(bytes 20 to 28\) must be finite"),
        (lambda data: corrupt(data, 300, math.inf), r"layer head\.0: biases \(bytes 268 to 316\) must be finite"),
        (lambda data: corrupt(data, 44, -0.1), r"features\.0: variances \(bytes 44 to 52\) .* not negative"),
    ],
)
def test_refuses_files(change, message, tmp_path):
    model, data, _ = net_and_values()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "a").write_bytes(change(data))
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "a")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_refuses_files_of_another_network(tmp_path):
    save_weights(make("yolo_v1_fast"), tmp_path / "a")
    for name in ("yolo_v1", "yolo_v1_small", "yolo_v1_tiny", "yolo_v1_local"):
        with pytest.raises(ValueError, match=r"too (short|long)"):
            load_weights(make(name), tmp_path / "a")


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"image_size": 100}, "image_size must be a multiple of the stride, 64, got 100"),
        ({"image_size": 0}, "image_size must be a multiple of the stride, 64, got 0"),
        ({"num_classes": 1}, "num_classes must be 2 or more"),
        ({"boxes": 0}, "boxes 1 or more"),
    ],
)
def test_refuses_arguments(argument, message):
    with pytest.raises(ValueError, match=message):
        make(**argument)


def test_images_of_all_sizes():
    """Also of one pixel, and without objects."""
    torch.manual_seed(0)
    model = make()
    images = [torch.rand(3, 1, 1), torch.rand(3, 200, 5)]
    loss = sum(model(images, [target(), target((0, 0, 1, 1, 1))]).values())
    loss.backward()
    assert loss.isfinite()
    assert len(model.eval()(images)) == 2


def test_error_types():
    """Each kind once, the fifth detection too many, and an image without objects."""
    truth = [target((0, 0, 10, 10, 1), (20, 20, 30, 30, 1), (40, 0, 50, 10, 2)), target(), target((0, 0, 10, 10, 2))]
    found = [
        {**target((0, 0, 10, 8, 1), (20, 20, 30, 24, 1), (0, 0, 9, 9, 2)), "scores": torch.tensor([0.9, 0.8, 0.7])},
        {**target((0, 0, 5, 5, 2)), "scores": torch.tensor([0.6])},
        {**target((0, 0, 10, 10, 2)), "scores": torch.tensor([0.5])},
    ]
    assert error_types(found, truth) == {"correct": 0.25, "localisation": 0.25, "class": 0.25, "background": 0.25}


def test_a_batch_has_no_targets():
    with pytest.raises(TypeError, match="images must be a list where there are targets"):
        make()(torch.rand(1, 3, 128, 128), [target()])
