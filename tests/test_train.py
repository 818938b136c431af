"""The training loop: it learns, stops and goes on, alone and with others."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyzoo.data import DigitScenes, digits
from pyzoo.train import fit


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


class Jittered(torch.utils.data.Dataset):
    """Digits with noise and shifts from all three generators; ``interrupt_at`` counts samples, as a user's Ctrl-C."""

    def __init__(self, count: int = 200, interrupt_at: int = -1):
        self.images, self.labels = (part[:count] for part in digits())
        self.interrupt_at, self.seen = interrupt_at, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if len(self.seen) == self.interrupt_at:
            raise KeyboardInterrupt
        self.seen.append(index)
        image = self.images[index].roll((random.randint(-1, 1), int(np.random.randint(-1, 2))), (1, 2))
        return image + torch.randn(1, 8, 8) * 0.1, self.labels[index]


def make(seed: int = 0, dropout: float = 0.0, lr: float = 0.1):
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(288, 10)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    return model, {"optimizer": optimizer, "schedule": schedule, "loss": F.cross_entropy}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_learns_digits():
    model, options = make()
    images, labels = digits("test")

    def accuracy(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"accuracy": (model(images).argmax(1) == labels).float().mean().item()}

    train = torch.utils.data.TensorDataset(*digits("train"))
    history = fit(model, train, batch_size=64, epochs=3, evaluate=accuracy, **options)
    assert len(history) == 68  # ceil(3 * 1437 / 64)
    assert [entry["step"] for entry in history] == list(range(1, 69))
    assert [entry["step"] for entry in history if "accuracy" in entry] == [22, 44, 66, 68]
    assert history[0]["loss"] > 2
    assert history[-1]["loss"] < 0.4
    assert history[-1]["accuracy"] > 0.85
    assert set(history[0]) == {"step", "loss", "lr"}


def test_the_order():
    """Each sample once an epoch, in an order that differs, and every batch full."""
    data = Jittered(count=10)
    model, options = make()
    history = fit(model, data, batch_size=4, epochs=2, **options)
    assert len(history) == 5
    first, second = data.seen[:10], data.seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    small = Jittered(count=3)
    fit(model, small, batch_size=8, steps=1, **options)  # more than there are
    assert np.bincount(small.seen).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_bit_for_bit(tmp_path, workers):
    """Interrupted twice, once before any checkpoint, and gone on with in new objects with other weights."""

    def run(folder, seed, interrupt_at=-1, workers=0):
        model, options = make(seed, dropout=0.3)
        data = Jittered(interrupt_at=interrupt_at)

        def evaluate(model):
            return {"drawn": torch.rand(()).item()}

        options.update(evaluate=evaluate, folder=folder, resume=True, workers=workers)
        return model, fit(model, data, batch_size=16, steps=15, every=4, clip_norm=1.0, **options)

    model, expected = run(tmp_path / "whole", 0)
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        run(folder, 0, interrupt_at=40)
    assert not list(folder.glob("checkpoint-*"))
    with pytest.raises(KeyboardInterrupt):
        run(folder, 0, interrupt_at=16 * 10 + 3)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-00000008"]
    (folder / "unfinished").mkdir()  # killed while it saved
    (folder / "unfinished" / "model.safetensors").write_bytes(b"half")
    again, history = run(folder, 99, workers=workers)
    assert history == expected
    assert torch.equal(weights(again), weights(model))
    assert [path.name for path in folder.iterdir()] == ["checkpoint-00000015"]
    _, history = run(folder, 7)  # nothing left to do
    assert history == expected


def test_checkpoints_of_another_run(tmp_path):
    model, options = make()
    options.update(folder=tmp_path, steps=2)
    fit(model, Jittered(), batch_size=8, **options)
    with pytest.raises(FileExistsError, match="resume=True goes on"):
        fit(model, Jittered(), batch_size=8, **options)
    with pytest.raises(ValueError, match=r"cannot go on from .*: batch_size was 8, is 4$"):
        fit(model, Jittered(), batch_size=4, resume=True, **options)
    history = fit(model, Jittered(), batch_size=8, resume=True, **{**options, "steps": 3})
    assert len(history) == 3


def test_gradient_accumulation_changes_nothing():
    runs = []
    for parts in (1, 4):
        model, options = make()
        history = fit(model, Jittered(), batch_size=16, steps=6, gradient_accumulation=parts, **options)
        runs.append((weights(model), [entry["loss"] for entry in history]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)


def test_evaluation_changes_nothing():
    runs = []
    for evaluate in (None, lambda model: {"drawn": torch.rand(()).item(), "more": random.random()}):
        model, options = make(dropout=0.3)
        fit(model, Jittered(), batch_size=16, steps=4, every=1, evaluate=evaluate, **options)
        runs.append(weights(model))
    assert torch.equal(*runs)


def test_schedule_and_clipping():
    model, options = make(lr=1.0)
    before = weights(model)
    history = fit(model, Jittered(), batch_size=16, steps=1, clip_norm=0.01, **options)
    assert (weights(model) - before).norm() == pytest.approx(0.01, rel=1e-3)
    assert history[0]["lr"] == 1.0
    assert options["optimizer"].param_groups[0]["lr"] == pytest.approx((1 + np.cos(np.pi / 40)) / 2)


def test_mixed_precision():
    model, options = make()
    dtypes = []
    model[0].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    history = fit(model, Jittered(), batch_size=16, steps=2, mixed_precision="bf16", **options)
    model(torch.zeros(1, 1, 8, 8))  # as before
    fit(model, Jittered(), batch_size=16, steps=1, mixed_precision="no", **options)
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert np.isfinite([entry["loss"] for entry in history]).all()


# ----------------------------------------------------------------------------------------------------------- detectors


class Detector(nn.Module):
    """As little as has a detector's contract: guesses the mean box and how many objects there are."""

    def __init__(self, broken_from: int = 1000):
        super().__init__()
        self.box, self.count = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(()))
        self.broken_from, self.calls = broken_from, 0

    def forward(self, images, targets=None):
        assert isinstance(images, list)
        assert all(image.shape[0] == 3 for image in images)
        if targets is None:
            return [{"boxes": self.box[None]} for _ in images]
        boxes = torch.cat([target["boxes"] for target in targets])
        count = torch.tensor([float(len(target["labels"])) for target in targets]).mean()
        self.calls += 1
        broken = float("nan") if self.calls >= self.broken_from else 1.0
        return {
            "loss_box": (self.box - boxes).abs().mean() * 0.01 * broken,
            "loss_count": (self.count - count).square(),
        }


def test_detector():
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    history = fit(model, DigitScenes(8, objects=(1, 3)), optimizer=optimizer, batch_size=4, steps=20)
    assert set(history[0]) == {"step", "loss", "loss_box", "loss_count", "lr"}
    assert all(entry["loss"] == pytest.approx(entry["loss_box"] + entry["loss_count"]) for entry in history)
    assert history[-1]["loss"] < history[0]["loss"]


def test_loss_that_is_not_finite(tmp_path):
    model = Detector(broken_from=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scenes = DigitScenes(8)
    with pytest.raises(FloatingPointError, match=r"at step 3 the loss 'loss_box' is nan; the batch .*\.pt$") as error:
        fit(model, scenes, optimizer=optimizer, batch_size=4, steps=5, folder=tmp_path)
    assert model.box.isfinite().all()  # the step was not taken
    batch = torch.load(str(error.value).rpartition(" ")[2], weights_only=True)
    for image, target in zip(batch["inputs"], batch["targets"], strict=True):
        expected, _ = scenes[target["image_id"]]
        assert torch.equal(image, expected)


# ----------------------------------------------------------------------------------------------------- many processes

SCRIPT = """
import sys, json, torch
sys.path[:0] = sys.argv[3:]
from test_train import Jittered, make, weights
from pyzoo.train import fit
torch.set_num_threads(1)
model, options = make(seed=int(sys.argv[2]))
history = fit(model, Jittered(), batch_size=16, steps=6, every=3, clip_norm=1.0, folder=sys.argv[1], resume=True,
              gradient_accumulation=2, **options)
torch.save((weights(model), [entry["loss"] for entry in history]), f"{sys.argv[1]}/result-{sys.argv[2]}")
"""


def test_two_processes_equal_one(tmp_path):
    model, options = make()
    history = fit(model, Jittered(), batch_size=16, steps=6, clip_norm=1.0, **options)
    expected = weights(model), [entry["loss"] for entry in history]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    if not torch.accelerator.is_available():
        del shared["ACCELERATE_USE_CPU"]  # as users start it
    root = Path(__file__).parent
    # The second one begins with other weights, which it has to take from the first.
    arguments = [
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(rank), str(root), str(root.parent)] for rank in (0, 1)
    ]
    processes = [
        subprocess.Popen(argv, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank, argv in enumerate(arguments)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    results = [torch.load(tmp_path / f"result-{rank}") for rank in (0, 1)]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": None}, r"steps, epochs must be given, one of the two, got \(None, None\)"),
        ({"epochs": 1}, r"one of the two, got \(1, 1\)"),
        ({"gradient_accumulation": 3}, "batch_size must be a multiple of 3: processes x accumulation, got 4"),
        ({"clip_norm": 0}, "clip_norm must be above 0, got 0"),
        ({"every": 0}, "every must be at least 1"),
        ({"mixed_precision": "int8"}, "mixed_precision must be no, fp16 or bf16, got 'int8'"),
        ({"resume": True}, "folder must be given in order to resume"),
        ({"dataset": []}, "the length of dataset must be at least 1, got 0"),
    ],
)
def test_bad_arguments(change, message):
    model, options = make()
    options = {"dataset": Jittered(), "batch_size": 4, "steps": 1, **options, **change}
    with pytest.raises(ValueError, match=message):
        fit(model, **options)


def test_loss_that_is_no_number():
    model, options = make()
    with pytest.raises(TypeError, match=r"the loss 'loss' must be a tensor of one number, got torch.Size\(\[4\]\)"):
        fit(model, Jittered(), batch_size=4, steps=1, **{**options, "loss": lambda y, t: y.sum(1)})
    with pytest.raises(TypeError, match="the loss 'a' must be a tensor of one number, got float"):
        fit(model, Jittered(), batch_size=4, steps=1, **{**options, "loss": lambda y, t: {"a": 0.5}})


def test_without_accelerate(monkeypatch):
    model, options = make()
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs accelerate; install it with: pip install 'pyzoo\[train\]'"):
        fit(model, Jittered(), batch_size=4, steps=1, **options)
