"""python -m benchmarks.models [NAME ...]: whole models against torchvision's, with the same weights on the same input.

Inference and a training step (forward, backward, SGD) run in turns in one process, after what both compute was
compared. Inputs are the two photographs of scikit-learn. Weights are random; statistics of batch norm are those of
the photographs, and the weights that score classes are enlarged until a detector has about as many boxes as after
training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

import pyzoo

from .measure import Budget, assert_agrees, geometric_mean, interleave, paired_ratio, tensors_of

BUDGET = Budget(seconds=20, max_pairs=9)


def photographs(size: tuple[int, int]) -> list[torch.Tensor]:
    from sklearn.datasets import load_sample_images

    images = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 for image in load_sample_images().images]
    return [F.interpolate(image, size, mode="bilinear", antialias=True)[0] for image in images]


def detector_targets(images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Five objects an image, of all sizes."""
    targets = []
    for image in images:
        height, width = image.shape[1:]
        share = torch.tensor([[0.1, 0.1, 0.2, 0.3], [0.3, 0.2, 0.9, 0.9], [0.5, 0.1, 0.6, 0.2], [0, 0.5, 0.3, 1]])
        boxes = share * torch.tensor([width, height, width, height])
        masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append({"boxes": boxes, "labels": torch.arange(1, len(boxes) + 1), "masks": masks})
    return targets


def make_peer(name: str) -> nn.Module:
    """torchvision's; detectors as it builds them around a trained backbone: batch norm and two stages are frozen."""
    if not name.endswith("resnet50_fpn"):
        options = {"weights_backbone": None} if name.startswith("ssd") else {}
        return torchvision.models.get_model(name, weights=None, **options)
    detection, misc = torchvision.models.detection, torchvision.ops.misc
    classes = {"fasterrcnn": detection.FasterRCNN, "maskrcnn": detection.MaskRCNN}
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=misc.FrozenBatchNorm2d, trainable_layers=3
    )
    return classes[name.partition("_")[0]](backbone, 91)


def fit_statistics(model: nn.Module, images: torch.Tensor) -> None:
    """Those of batch norm, one layer after the other, become those of these images."""

    def fit(norm, inputs):
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)))

    norms = [module for module in model.modules() if hasattr(module, "running_var")]
    if not norms:
        return
    handles = [norm.register_forward_pre_hook(fit) for norm in norms]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()


def make_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours, in channels_last, and torchvision's, as it is or, where it is faster so, in channels_last; with equal
    weights, of which the same learn."""
    torch.manual_seed(0)
    peer = make_peer(name)
    fit_statistics(getattr(peer, "backbone", peer), torch.stack(photographs((224, 224))) * 4 - 2)
    for key, weight in peer.named_parameters():
        if key.endswith("cls_score.weight"):
            weight.data *= 40
        elif "classification_head" in key and key.endswith("weight"):
            weight.data *= 6
    model = pyzoo.create_model(name)
    model.load_state_dict(peer.state_dict())
    learn = dict(peer.named_parameters())
    for key, weight in model.named_parameters():
        weight.requires_grad_(learn[key].requires_grad)
    if name.startswith("mobilenet"):
        peer = peer.to(memory_format=torch.channels_last)
    return model.to(memory_format=torch.channels_last), peer


def cases(names: list[str]) -> Iterator[tuple[str, str, list]]:
    """Name of a model, what it is given, and that."""
    for name in names:
        if name.startswith(("resnet", "vgg", "mobilenet")):
            for count in (1, 8, 32) if name.startswith("mobilenet") else (1, 8):
                yield name, f"{count} x 224 x 224", torch.stack((photographs((224, 224)) * 16)[:count])
        elif name.startswith("ssd"):
            for count in (1, 8):
                yield name, f"{count} x 427 x 640", (photographs((427, 640)) * 4)[:count]
        else:
            yield name, "1 x 427 x 640", photographs((427, 640))[:1]
            yield name, "2 x 300 x 400", photographs((300, 400))


def inference(model: nn.Module, images) -> Callable[[], object]:
    model.eval()

    def call():
        with torch.no_grad():
            return model(images)

    return call


def training_step(model: nn.Module, images) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)  # so small that the losses stay comparable
    is_detector = isinstance(images, list)
    targets = detector_targets(images) if is_detector else torch.arange(len(images))

    def call():
        torch.manual_seed(0)  # both draw the same boxes
        optimizer.zero_grad()
        losses = model(images, targets) if is_detector else {"loss": F.cross_entropy(model(images), targets)}
        sum(losses.values()).backward()
        optimizer.step()
        return dict(sorted(losses.items()))

    return call


def comparable(result) -> list[torch.Tensor]:
    """What rounding does not change much: scores, but not the order of boxes with equal ones; and not the losses of
    the boxes that are drawn from such an order."""
    if isinstance(result, list):
        return [found["scores"] for found in result]
    if isinstance(result, dict):
        return [loss for name, loss in result.items() if name not in ("loss_box_reg", "loss_classifier", "loss_mask")]
    return tensors_of(result)


class Rounding:
    exact = False
    tolerances = {torch.float32: (1e-3, 1e-3)}  # noqa: RUF012


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.partition("\n")[0])
    known = ["resnet50", "vgg16", "mobilenet_v2", "fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "ssd300_vgg16"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(known)}")
    parser.add_argument("--json", metavar="FILE", help="file for the samples")
    args = parser.parse_args(argv)
    console = Console() if Console().is_terminal else Console(width=120)
    table = Table("model", "input", "", "torchvision", "pyzoo", "faster", "boxes")
    results, ratios = [], {}
    for name, label, images in cases(args.names or known):
        for kind in (inference, training_step):
            calls = [kind(model, images) for model in make_pair(name)]
            ours, theirs = calls[0](), calls[1]()
            boxes = str([len(found["boxes"]) for found in ours]) if isinstance(ours, list) else ""
            assert_agrees(comparable(ours), comparable(theirs), Rounding)
            samples = interleave(calls, BUDGET)
            ratio = paired_ratio(*samples)
            ratios.setdefault((name, kind.__name__), []).append(ratio)
            times = [f"{statistics.median(s) * 1e3:.0f} ms" for s in reversed(samples)]
            console.print(f"{name}, {label}, {kind.__name__}: {ratio:.2f}x")
            table.add_row(name, label, kind.__name__.replace("_", " "), *times, f"{ratio:.2f}x", boxes)
            results.append({"model": name, "input": label, "kind": kind.__name__, "ratio": ratio, "samples": samples})
    console.print(table)
    for (name, kind), values in ratios.items():
        console.print(f"{name} {kind.replace('_', ' ')}: {geometric_mean(values):.2f}x")
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, {torch.get_num_threads()} threads"
    console.print(versions)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"versions": versions, "results": results}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
