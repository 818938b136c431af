"""Data: digit scenes, and datasets in local folders, which the tests make."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys

import numpy as np
import PIL.Image as PIL
import pytest
import torch
import torchvision

from pyzoo.data import (
    CocoDetection,
    DigitScenes,
    VocDetection,
    cifar10,
    detection_collate,
    digits,
    image_folder,
    mnist,
)
from pyzoo.metrics import coco_map

# -------------------------------------------------------------------------------------------------------- digit scenes


def assert_same(a, b):
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(torch.as_tensor(a[1][k]), torch.as_tensor(b[1][k])) for k in a[1])


def test_digits():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert (images.min(), images.max()) == (0, 1)
    assert labels.unique().tolist() == list(range(10))
    parts = [digits(split) for split in ("train", "test")]
    assert torch.equal(torch.cat([part[0] for part in parts]), images)
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    images.zero_()  # the caller's own
    assert digits()[0].any()


def test_scenes_keep_the_contract():
    height, width = 80, 112
    scenes = DigitScenes(60, (height, width), seed=1, objects=(0, 6), scale=(10, 50), max_overlap=0.5)
    counts, covered, labels = set(), 0, set()
    for index, (image, target) in enumerate(scenes):
        boxes, masks = target["boxes"], target["masks"]
        n = len(boxes)
        assert image.shape == (3, height, width)
        assert image.dtype == torch.float32
        assert image.min() >= 0
        assert image.max() <= 1
        assert (boxes.dtype, masks.dtype, target["labels"].dtype) == (torch.float32, torch.uint8, torch.int64)
        assert boxes.shape == (n, 4)
        assert masks.shape == (n, height, width)
        assert target["labels"].shape == (n,)
        assert target["image_id"] == index
        assert masks.sum(0).max() <= 1  # one digit a pixel: what is visible
        for box, mask in zip(boxes, masks, strict=True):
            ys, xs = np.nonzero(mask.numpy())
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        counts.add(n)
        labels.update(target["labels"].tolist())
        boxes = boxes.tolist()
        covered += sum(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a in boxes for b in boxes) - n
    assert {0, 1, 2, 3, 4, 5} <= counts
    assert labels == set(range(1, 11))
    assert covered > 10


def test_scenes_show_the_digits():
    """Where the mask is, all channels are brighter than the ground, or all are darker."""
    for image, target in DigitScenes(20, seed=2, objects=(1, 1)):
        mask = target["masks"][0].bool()
        difference = image[:, mask].mean(1) - image[:, ~mask].mean(1)
        assert (difference > 0.1).all() or (difference < -0.1).all()


def test_scenes_without_overlap():
    for _, target in DigitScenes(30, seed=3, objects=(4, 4), max_overlap=0):
        boxes = target["boxes"]
        size = torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])
        assert ((size > 0).all(2).sum(1) == 1).all()  # each with itself


def test_scenes_depend_on_seed_and_index_only():
    scenes = DigitScenes(9, seed=5)
    forward = list(scenes)
    backward = [DigitScenes(20, seed=5)[i] for i in reversed(range(9))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert_same(a, b)
    assert_same(scenes[-1], forward[8])
    assert len(scenes[2:4]) == 2
    with pytest.raises(IndexError, match="index 9 of 9"):
        scenes[9]
    others = [forward[1], DigitScenes(9, seed=6)[0], DigitScenes(9, seed=5, split="test")[0]]
    assert all(not torch.equal(forward[0][0], other[0]) for other in others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"size": (96, 4)}, r"size must be .*got \(96, 4\)"),
        ({"objects": (3, 2)}, r"objects must be .*got \(3, 2\)"),
        ({"scale": (16, 90)}, r"scale must be .*to 76.8.*got \(16, 90\)"),
        ({"max_overlap": 2}, "max_overlap must be in"),
        ({"split": "val"}, "split must be 'train' or 'test', got 'val'"),
    ],
)
def test_scenes_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        DigitScenes(**{"count": 3, **change})
    with pytest.raises(ValueError, match="split must be"):
        digits("val")


# ------------------------------------------------------------------------------------------------ datasets in folders


def save_image(path, height, width, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    PIL.fromarray(pixels).convert(mode).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def make_coco(folder):
    """Image 7 has a polygon, a run-length mask, a box beyond the edge, one without width and a crowd; 3 has nothing."""
    image = save_image(folder / "val2017" / "b.png", 20, 30)
    save_image(folder / "val2017" / "a.png", 16, 12, mode="L")
    square = [[4, 5, 10, 5, 10, 9, 4, 9]]
    runs = {"size": [20, 30], "counts": [40, 60, 500]}  # columns 2, 3 and 4
    objects = [
        {"bbox": [4, 5, 6, 4], "segmentation": square, "area": 24, "iscrowd": 0, "category_id": 18},
        {"bbox": [2, 0, 3, 20], "segmentation": runs, "area": 60, "iscrowd": 0, "category_id": 90},
        {"bbox": [25, -2, 9, 9], "segmentation": square, "area": 81, "iscrowd": 0, "category_id": 1},
        {"bbox": [6, 6, 0, 5], "segmentation": square, "area": 0, "iscrowd": 0, "category_id": 2},
        {"bbox": [2, 0, 3, 20], "segmentation": runs, "area": 60, "iscrowd": 1, "category_id": 18},
    ]
    images = [
        {"id": 7, "file_name": "b.png", "height": 20, "width": 30},
        {"id": 3, "file_name": "a.png", "height": 16, "width": 12},
    ]
    annotations = [{"id": i, "image_id": 7, **o} for i, o in enumerate(objects, 1)]
    path = folder / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    content = {"images": images, "annotations": annotations, "categories": [{"id": i} for i in range(1, 91)]}
    path.write_text(json.dumps(content))
    return image


def test_coco(tmp_path, capsys):
    pixels = make_coco(tmp_path)
    data = CocoDetection(tmp_path, "val2017")
    assert capsys.readouterr().out == ""
    (empty, nothing), (image, target) = data  # in the order of the ids
    torch.testing.assert_close(image, pixels)
    assert target["boxes"].tolist() == [[4, 5, 10, 9], [2, 0, 5, 20], [25, 0, 30, 7]]
    assert target["labels"].tolist() == [18, 90, 1]
    assert target["area"].tolist() == [24, 60, 81]
    assert target["iscrowd"].tolist() == [0, 0, 0]
    assert target["image_id"] == 7
    expected = torch.zeros(2, 20, 30, dtype=torch.uint8)
    expected[0, 5:9, 4:10] = 1
    expected[1, :, 2:5] = 1
    assert torch.equal(target["masks"][:2], expected)
    assert empty.shape == (3, 16, 12)  # grey in the file
    assert {name: tuple(value.shape) for name, value in nothing.items() if name != "image_id"} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 16, 12),
        "area": (0,),
        "iscrowd": (0,),
    }
    dtypes = {"boxes": torch.float32, "labels": torch.int64, "masks": torch.uint8}
    assert all(t[name].dtype == dtype for t in (target, nothing) for name, dtype in dtypes.items())

    images, targets = detection_collate([data[1], data[0]])
    assert [tuple(image.shape) for image in images] == [(3, 20, 30), (3, 16, 12)]
    assert [target["image_id"] for target in targets] == [7, 3]
    crowds = CocoDetection(tmp_path, "val2017", crowds=True, transform=lambda image, target: (None, target))[1]
    assert crowds[0] is None
    assert crowds[1]["iscrowd"].tolist() == [0, 0, 0, 1]


def test_coco_figures(tmp_path):
    """What is found where there is a crowd does not count against the rest."""
    make_coco(tmp_path)
    targets = [target for _, target in CocoDetection(tmp_path, "val2017", crowds=True)]
    predictions = [{**target, "scores": 0.9 + 0.05 * target["iscrowd"]} for target in targets]
    assert coco_map(predictions, targets)["AP"] == pytest.approx(1)
    assert coco_map(predictions, targets, "segm")["AP"] == pytest.approx(1)
    without = [target for _, target in CocoDetection(tmp_path, "val2017")]
    assert coco_map(predictions, without)["AP"] < 0.9


VOC_OBJECT = """
<object><name>{}</name><difficult>{}</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def make_voc(folder, year="2012", split="train"):
    base = folder / "VOCdevkit" / f"VOC{year}"
    (base / "Annotations").mkdir(parents=True)
    (base / "ImageSets" / "Main").mkdir(parents=True)
    objects = {
        "a": [("dog", 0, 1, 1, 30, 20), ("aeroplane", 1, 3, 4, 8, 9), ("person", 0, 5.5, 6, 4, 9)],
        "b": [],
    }
    for name, items in objects.items():
        save_image(base / "JPEGImages" / f"{name}.jpg", 20, 30)
        text = "".join(VOC_OBJECT.format(*item) for item in items)
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation><size/>{text}</annotation>")
    (base / "ImageSets" / "Main" / f"{split}.txt").write_text("a\nb\n")
    return base


def test_voc(tmp_path):
    base = make_voc(tmp_path)
    (image, target), (_, nothing) = VocDetection(tmp_path)
    assert image.shape == (3, 20, 30)
    assert image.max() <= 1
    assert target["boxes"].tolist() == [[0, 0, 30, 20]]  # the whole image; the person has no area
    assert target["labels"].tolist() == [12]
    assert target["area"].tolist() == [600]
    assert target["image_id"] == 0
    assert nothing["boxes"].shape == (0, 4)
    assert nothing["labels"].dtype == torch.int64
    _, target = VocDetection(tmp_path, difficult=True)[0]
    assert target["boxes"].tolist() == [[0, 0, 30, 20], [2, 3, 8, 9]]
    assert target["labels"].tolist() == [12, 1]
    assert target["iscrowd"].tolist() == [0, 1]
    make_voc(tmp_path, "2007", "test")
    assert len(VocDetection(tmp_path, "2007", "test")) == 2
    path = base / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("dog", "wolf"))
    with pytest.raises(ValueError, match=r"a\.xml has the class 'wolf'"):
        VocDetection(tmp_path)[0]


def test_image_folder(tmp_path):
    for name, height in (("cat", 40), ("ant", 50)):
        save_image(tmp_path / name / "1.png", height, 60)
    data = image_folder(tmp_path, size=32)
    assert [label for _, label in data] == [0, 1]
    image, _ = data[0]
    assert image.shape == (3, 32, 32)
    assert torch.equal(image, data[0][0])
    assert -2.2 < image.min() < -1
    augmented = image_folder(tmp_path, size=32, augment=True)
    assert augmented[0][0].shape == (3, 32, 32)
    assert not torch.equal(augmented[0][0], augmented[0][0])


def make_cifar10(folder, monkeypatch, per_file=4):
    """Returns all images, and makes torchvision expect the checksums of these files."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6, per_file, 3 * 32 * 32), dtype=np.uint8)
    sums = {}
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]):
        content = {"label_names": list("abcdefghij")}
        if i < 6:
            content = {"data": images[i], "labels": [(i + k) % 10 for k in range(per_file)]}
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    peer = torchvision.datasets.CIFAR10
    monkeypatch.setattr(peer, "train_list", [[f"data_batch_{k}", sums[f"data_batch_{k}"]] for k in range(1, 6)])
    monkeypatch.setattr(peer, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(peer, "meta", {**peer.meta, "md5": sums["batches.meta"]})
    return torch.from_numpy(images).view(6, per_file, 3, 32, 32) / 255


def test_cifar10(tmp_path, monkeypatch):
    pixels = make_cifar10(tmp_path, monkeypatch)
    train, test = cifar10(tmp_path), cifar10(tmp_path, "test")
    torch.testing.assert_close(torch.stack([image for image, _ in train]), pixels[:5].flatten(0, 1))
    torch.testing.assert_close(torch.stack([image for image, _ in test]), pixels[5])
    assert [label for _, label in train] == [0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5, 6, 4, 5, 6, 7]
    assert [label for _, label in test] == [5, 6, 7, 8]
    augmented = cifar10(tmp_path, augment=True)
    torch.manual_seed(0)
    views = [augmented[0][0] for _ in range(60)]
    assert all(view.shape == (3, 32, 32) for view in views)
    center = pixels[0, 0, :, 12:20, 12:20]

    def holds(view, part):
        windows = view.unfold(1, 8, 1).unfold(2, 8, 1)
        return bool(((windows - part[:, None, None]).abs().amax((0, 3, 4)) < 1e-3).any())

    straight, mirrored = (sum(holds(view, part) for view in views) for part in (center, center.flip(2)))
    assert straight + mirrored == 60
    assert 15 < straight < 45
    assert len({view.numpy().tobytes() for view in views}) > 30


def test_cifar10_runs_no_code_of_other_files(tmp_path, monkeypatch):
    make_cifar10(tmp_path, monkeypatch)

    class Evil:
        def __reduce__(self):
            return (tmp_path / "evil").touch, ()

    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"cifar10: the files in .* are not those of CIFAR10.*corrupted"):
        cifar10(tmp_path)
    assert not (tmp_path / "evil").exists()


def make_mnist(folder, images, labels):
    """The four files of MNIST: a magic number, sizes, and bytes; numbers are big-endian."""
    base = folder / "MNIST" / "raw"
    base.mkdir(parents=True, exist_ok=True)
    for split, (pixels, targets) in zip(("train", "t10k"), zip(images, labels, strict=True), strict=True):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", targets)):
            header = np.array([0x800 + array.ndim, *array.shape], dtype=">i4").tobytes()
            (base / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return base


def test_mnist(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (5, 3)]
    labels = [np.array([3, 1, 4, 1, 5], dtype=np.uint8), np.array([9, 2, 6], dtype=np.uint8)]
    base = make_mnist(tmp_path, images, labels)
    for data, pixels, targets in zip((mnist(tmp_path), mnist(tmp_path, "test")), images, labels, strict=True):
        torch.testing.assert_close(torch.cat([image for image, _ in data]), torch.from_numpy(pixels) / 255)
        assert [label for _, label in data] == targets.tolist()
    make_mnist(tmp_path, images, [labels[0][:4], labels[1]])
    with pytest.raises(ValueError, match=r"mnist: the files in .* have 5 images, 4 labels"):
        mnist(tmp_path)
    for content in (b"", b"nothing of that kind", (base / "train-images-idx3-ubyte").read_bytes()[:100]):
        (base / "train-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(ValueError, match=r"mnist: the files in .* are not those of MNIST"):
            mnist(tmp_path)


@pytest.mark.parametrize(("make", "peer"), [(cifar10, "CIFAR10"), (mnist, "MNIST")])
def test_downloads_only_if_told_to(tmp_path, monkeypatch, make, peer):
    asked = []

    def download(self):
        asked.append(self.root)
        raise ConnectionError("no network here")

    monkeypatch.setattr(getattr(torchvision.datasets, peer), "download", download)
    with pytest.raises(FileNotFoundError, match=f"{make.__name__}: there is no"):
        make(tmp_path)
    assert not asked
    with pytest.raises(ConnectionError, match="no network here"):
        make(tmp_path, download=True)
    assert asked
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        make(tmp_path, "val")


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (cifar10, "cifar-10-batches-py/data_batch_1"),
        (mnist, "MNIST/raw/train-images-idx3-ubyte"),
        (CocoDetection, "annotations/instances_train2017.json"),
        (VocDetection, "Annotations"),
        (image_folder, "n01443537"),
    ],
)
def test_missing_folders(tmp_path, make, layout):
    with pytest.raises(FileNotFoundError, match=rf"there is no .*none; expected in .* is:\n[^$]*{layout}"):
        make(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=rf"xpected in .* is:\n[^$]*{layout}"):
        make(tmp_path)


def test_broken_annotations(tmp_path):
    make_coco(tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"
    for content in ("", "{", "[]", '{"annotations": [{"id": 1}]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"instances_val2017\.json has no annotations as COCO's"):
            CocoDetection(tmp_path, "val2017")


def test_without_torchvision(tmp_path, monkeypatch):
    make_coco(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs torchvision; install it with: pip install 'pyzoo\[train\]'"):
        CocoDetection(tmp_path, "val2017")
