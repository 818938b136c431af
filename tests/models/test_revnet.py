"""RevNet against itself with stored activations, and against the numbers of its paper and of the authors' code."""

from __future__ import annotations

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyzoo
from benchmarks.measure import peak_bytes
from pyzoo.data import digits
from pyzoo.models.revnet import RevNet, SameConv2d, from_tensorflow, same_pad
from pyzoo.train import fit
from tests.models.test_resnet import count_macs
from tests.stacks import saved_bytes

# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("name", "classes", "parameters", "macs", "convolutions", "depth"),
    [
        ("revnet38_cifar", 100, 475_060, 77_231_200, 37, 38),
        ("revnet110_cifar", 100, 1_740_804, 253_330_688, 109, 110),
        ("revnet164_cifar", 100, 1_794_948, 250_188_800, 169, 164),
        ("revnet56", 1000, 27_553_128, 4_450_928_640, 63, 56),
        ("revnet104", 1000, 45_428_072, 7_944_783_872, 111, 104),
    ],
)
def test_numbers(name, classes, parameters, macs, convolutions, depth):
    with torch.device("meta"):
        model = pyzoo.create_model(name, num_classes=classes)
    convs = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(convs) == convolutions
    assert sum("shortcut" not in key for key in convs) + 1 == depth
    if classes == 1000:
        assert count_macs(model, 3, 224, 224) == macs
    else:
        assert count_macs(pyzoo.create_model(name), 3, 32, 32) == macs


# ------------------------------------------------------------------------------------------------ as the stored version


def make(units=(2, 2, 2), widths=(8, 8, 12, 16), dtype=torch.float64, seed=0, **options) -> RevNet:
    torch.manual_seed(seed)
    return RevNet(units, widths, 5, **options).to(dtype)


def step(model: RevNet, x, y):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters())], list(model.buffers())


def check_step(model: RevNet, size=(12, 16), rtol=1e-12) -> None:
    twin = copy.deepcopy(model)
    twin.reversible = False
    x, y = torch.randn(3, 3, *size, dtype=next(model.parameters()).dtype), torch.arange(3)
    for _ in range(2):  # the second time after the statistics have changed
        (grads, buffers), (expected, statistics) = step(model, x, y), step(twin, x, y)
        for got, want in zip(grads, expected, strict=True):
            assert (got - want).norm() <= rtol * max(float(want.norm()), float(expected[-2].norm()))
        for got, want in zip(buffers, statistics, strict=True):
            torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("units", [(1, 1), (2, 3), (33,)])
def test_gradients(units):
    """Also that running statistics are updated once, not again in the second run."""
    check_step(make(units, (8, 8, 12)[: len(units) + 1]))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"bottleneck": True}, (12, 16)),
        ({"large": True}, (64, 47)),
        ({"bottleneck": True, "large": True, "same_padding": True}, (64, 47)),
        ({"norm_layer": partial(nn.GroupNorm, 1)}, (12, 16)),
        ({}, (1, 1)),
        ({}, (7, 5)),
    ],
)
def test_gradients_of_variants(options, size):
    check_step(make(**options), size)


def test_gradients_in_float32():
    check_step(make((9, 9, 9), dtype=torch.float32), rtol=1e-3)


def test_gradients_in_evaluation():
    """With fixed statistics, which both runs read."""
    model = make()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(4, 3, 12, 16).double())
    check_step(model.eval())


def test_backward_twice():
    model = make()
    loss = model(torch.randn(2, 3, 12, 16).double()).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    statistics = [b.clone() for b in model.buffers()]
    loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [2 * grad for grad in once])
    torch.testing.assert_close(list(model.buffers()), statistics, rtol=0, atol=0)


def test_mixed_precision():
    """Rebuilding in bfloat16 costs no accuracy: the halves are float32."""
    model = make((5, 5), (16, 16, 16), torch.float32)
    x, y = torch.randn(8, 3, 12, 16), torch.arange(8) % 5

    def gradient(reversible, enabled=True):
        model.reversible = reversible
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(x), y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])

    exact = gradient(False, enabled=False)
    stored, rebuilt = ((gradient(reversible) - exact).norm() / exact.norm() for reversible in (False, True))
    assert rebuilt < 1.3 * stored < 0.6


def test_functional_gradient():
    model = make().eval()
    x = torch.randn(2, 3, 12, 16).double().requires_grad_()

    def loss(x):
        return model(x).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("how", ["compile", "export"])
def test_compiles_and_exports(how):
    model = make((1, 2), (8, 8, 12), torch.float32).eval()
    x = torch.randn(2, 3, 12, 16)
    with torch.no_grad():
        if how == "compile":
            graph = torch.compile(model, fullgraph=True, backend="aot_eager")
        else:
            graph = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},)).module()
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


def test_compiled_training():
    """The graph breaks at the reversible stacks; gradients are the same."""
    torch._dynamo.reset()
    model = make((2, 2), (8, 8, 12))
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    x, y = torch.randn(2, 3, 12, 16).double(), torch.arange(2)
    for net in (model, compiled):
        F.cross_entropy(net(x), y).backward()
    for got, want in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_is_flat_in_depth():
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    saved, peak = {}, {}
    for reversible in (True, False):
        for units in (2, 6, 18):
            model = make((units,) * 3, dtype=torch.float32, reversible=reversible)
            saved[reversible, units] = saved_bytes(model, x)

            def training_step(model=model):
                return torch.autograd.grad(F.cross_entropy(model(x), y), [*model.parameters()])

            peak[reversible, units] = peak_bytes(training_step)
    assert saved[True, 2] == saved[True, 6] == saved[True, 18]
    assert peak[True, 18] < 1.1 * peak[True, 2]
    assert saved[False, 18] > 6 * saved[False, 2] > 6 * saved[True, 2]
    assert peak[False, 18] > 4 * peak[False, 2]


def test_what_is_stored():
    """Of the units: the input of each stage and the output of the last. A unit that changes the size stores no more."""
    model = make((3, 3), (8, 8, 12), torch.float32)
    stem = torch.randn(2, 8, 12, 16).requires_grad_()
    stages = nn.Sequential(*model.stages)
    assert saved_bytes(stages, stem) == 4 * 2 * (8 * 12 * 16 + 8 * 12 * 16 + 12 * 6 * 8)


# ------------------------------------------------------------------------------------------------------------- training


def test_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    data = torch.utils.data.TensorDataset(*digits("train"))

    def run(folder, steps, seed=0):
        model = make((2, 2), (8, 8, 16), torch.float32, seed, in_channels=1)
        model.logit = nn.Linear(16, 10)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        options = {"optimizer": optimizer, "loss": F.cross_entropy, "batch_size": 16}
        return model, fit(model, data, steps=steps, every=4, folder=folder, resume=True, **options)

    model, expected = run(tmp_path / "whole", 10)
    run(tmp_path / "parts", 6)  # the last step has a checkpoint
    other, history = run(tmp_path / "parts", 10, seed=1)
    assert history == expected
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_trains_as_the_stored_version():
    images, labels = (part[:64] for part in digits("train"))
    images = images.double()  # in float32 rounding grows to a percent in five steps, by the number of threads
    losses = {}
    for reversible in (True, False):
        torch.manual_seed(0)
        model = RevNet((3, 3), (16, 16, 32), in_channels=1, reversible=reversible).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        losses[reversible] = []
        for _ in range(40):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[reversible].append(loss.item())
    torch.testing.assert_close(losses[True][:5], losses[False][:5], rtol=1e-6, atol=0)
    assert max(losses[True][-1], losses[False][-1]) < 0.2 < 2 < losses[True][0]


# ------------------------------------------------------------------------------------------------- the authors' weights


def tensorflow_name(key: str) -> str:
    """As in the authors' code, from the names there: each unit, function and layer has a scope of its own."""
    key = re.sub(r"^stages\.(\d)\.first\.", lambda m: f"unit_{int(m[1]) + 1}_0.", key)
    key = re.sub(r"^stages\.(\d)\.rest\.(\d+)\.", lambda m: f"unit_{int(m[1]) + 1}_{int(m[2]) + 1}.", key)
    key = re.sub(r"(bn|conv)(\d)\.", r"sub\2.\1\2.", key)
    key = re.sub(r"shortcut(\d)", r"x\1_bottleneck.project", key)
    key = re.sub(r"^final_bn", "unit_last.final_bn", key)
    key = re.sub(r"^init_", "init.init_", key)
    norm = "bn" in key
    key = key.replace("running_", "ema_")
    return re.sub(r"weight$", "gamma" if norm else "w", re.sub(r"bias$", "beta" if norm else "b", key)).replace(
        ".", "/"
    )


def test_weights_of_the_authors():
    model = make((2, 2), (8, 8, 12), torch.float32, bottleneck=True, same_padding=True)
    arrays = {"global_step": np.array(80_000), "logit/w/Momentum": np.zeros((48, 5))}
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            value = torch.rand_like(value)
            value = value.permute(2, 3, 1, 0) if value.dim() == 4 else value.T if value.dim() == 2 else value
            arrays[tensorflow_name(key)] = value.numpy()
    for name in ("init/init_conv/w", "unit_1_1/g/sub3/conv3/w", "unit_2_0/x2_bottleneck/project/w", "logit/b"):
        assert name in arrays
    assert {"unit_last/final_bn/ema_var", "init/init_bn/beta", "unit_1_0/f/sub2/bn2/gamma"} <= arrays.keys()
    model.load_state_dict(from_tensorflow(arrays))
    assert torch.equal(model.logit.weight, torch.from_numpy(arrays["logit/w"]).T)
    kernel = torch.from_numpy(arrays["unit_2_1/f/sub2/conv2/w"])  # [height, width, in, out]
    assert torch.equal(model.stages[1].rest[0].f.conv2.weight[3, 2], kernel[:, :, 2, 3])


@pytest.mark.parametrize(("size", "before"), [((8, 8), (0, 0)), ((7, 9), (1, 1)), ((8, 7), (0, 1)), ((1, 2), (1, 0))])
def test_same_padding(size, before):
    """TensorFlow's rule: ceil(n / stride) outputs, and of the padding the smaller half before."""
    conv = SameConv2d(1, 1, 3, 2, bias=False)
    out = conv(x := torch.randn(1, 1, *size))
    assert out.shape[2:] == tuple(-(-n // 2) for n in size)
    padded = F.pad(x, (before[1], 2, before[0], 2))
    expected = F.conv2d(padded, conv.weight, stride=2)[:, :, : out.shape[2], : out.shape[3]]
    torch.testing.assert_close(out, expected)
    assert same_pad(torch.ones(1, 1, 224, 224), 7, 2).shape == (1, 1, 229, 229)
    assert same_pad(torch.ones(1, 1, 8, 8), 1, 2).shape == (1, 1, 8, 8)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("units", "widths", "message"),
    [
        ((2, 2), (8, 8), r"widths must be one more than units, 3, got \(8, 8\)"),
        ((), (8,), "widths must be one more than units"),
        ((2, 0), (8, 8, 8), r"units must be 1 or more in each stage, got \(2, 0\)"),
        ((2, 2), (8, 8, 9), r"widths must be even.*got \(8, 8, 9\)"),
        ((2, 2), (8, 0, 8), r"widths must be even"),
    ],
)
def test_impossible_sizes(units, widths, message):
    with pytest.raises(ValueError, match=f"RevNet: {message}"):
        RevNet(units, widths)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 0, 8), (3, 8, 8)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=rf"RevNet: x must have shape \[N, 3, H, W\].*got {re.escape(str([*shape]))}"):
        make(dtype=torch.float32)(torch.zeros(shape))


def test_bad_labels():
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        F.cross_entropy(make(dtype=torch.float32)(torch.zeros(2, 3, 8, 8)), torch.tensor([1, 5]))
