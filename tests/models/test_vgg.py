"""VGG: tables, torchvision's names and numbers, taps, linear layers as convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyzoo
from pyzoo.models.vgg import TABLE_1, VGG, fc_as_conv, from_caffe_names, layer_index, make_features, prepare, run

NETS = ("vgg11", "vgg13", "vgg16", "vgg19")
SMALL = {"width": 4, "hidden": 32, "num_classes": 7}


def small(config: str = "D", **options) -> VGG:
    torch.manual_seed(0)
    return VGG(config, **{**SMALL, **options}).eval()


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("name", [name + bn for name in NETS for bn in ("", "_bn")])
def test_state_dict_of_torchvision(name):
    peer = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        ours, theirs = pyzoo.create_model(name), getattr(peer, name)()
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert len(expected) == {"vgg16": 32, "vgg19": 38, "vgg16_bn": 97, "vgg19_bn": 118}.get(name, len(expected))


@pytest.mark.parametrize("bn", [False, True])
def test_equal_to_torchvision(bn):
    """The whole VGG-16 with torchvision's random weights: logits, and the gradients of its convolutions."""
    peer = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    theirs = (peer.vgg16_bn if bn else peer.vgg16)(num_classes=10).eval()
    with torch.device("meta"):
        ours = pyzoo.create_model("vgg16_bn" if bn else "vgg16", num_classes=10).eval()
    state = theirs.state_dict()
    for name, value in state.items():  # statistics that are not 0 and 1
        if name.endswith(("mean", "var")):
            value += torch.rand_like(value) * 0.02
    ours.load_state_dict(state, assign=True)
    x = torch.randn(1, 3, 80, 97)
    with torch.no_grad():
        close(ours(x), theirs(x), 1e-4)
    # In float64, as in float32 rounding puts values on the other side of a ReLU.
    x, ours, theirs = x.double(), ours.features.double(), theirs.features.double()
    expected = torch.autograd.grad(theirs(x).square().sum(), theirs.parameters())
    actual = torch.autograd.grad(run(ours, x).square().sum(), ours.parameters())
    for a, e in zip(actual, expected, strict=True):
        close(a / e.abs().max(), e / e.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance", "seed"), [(torch.float64, 1e-9, 0), (torch.float32, 1e-3, 1)])
def test_training_of_torchvision(dtype, tolerance, seed):
    """The same seed drops the same units: the same loss and gradients. In float32 the seed is one at which rounding
    turns no ReLU off: where it does, torchvision's own gradients are 1e-2 from those of float64."""
    peer = pytest.importorskip("torchvision").models.vgg
    torch.manual_seed(seed)
    ours = VGG("A", batch_norm=True, num_classes=5, hidden=64)
    theirs = peer.VGG(peer.make_layers(peer.cfgs["A"], batch_norm=True), num_classes=5, init_weights=False)
    theirs.classifier = nn.Sequential(
        nn.Linear(25088, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Dropout(),
        nn.Linear(64, 5),
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(2, 3, 64, 64, dtype=dtype), torch.tensor([1, 3])
    losses = []
    for model in (ours.to(dtype), theirs.to(dtype)):
        torch.manual_seed(1)
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
    close(losses[0], losses[1])
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = other.grad.abs().max()
        assert (parameter.grad - other.grad).abs().max() <= tolerance * scale + tolerance / 1000, name
    close(ours.state_dict()["features.1.running_mean"], theirs.state_dict()["features.1.running_mean"])


# --------------------------------------------------------------------------------------------------------------- tables


def test_parameters_of_the_features():
    count = {"D": 14_714_688, "E": 20_024_384}
    with torch.device("meta"):
        for config, expected in count.items():
            assert sum(p.numel() for p in make_features(config).parameters()) == expected
        vgg = VGG()
    fc = [sum(p.numel() for p in vgg.classifier[i].parameters()) for i in (0, 3, 6)]
    assert fc == [102_764_544, 16_781_312, 4_097_000]


@pytest.mark.parametrize(("config", "expected"), [("D", 15_470_264_320), ("E", 19_632_062_464)])
def test_multiplications(config, expected):
    macs = 0

    def count(module, _, out):
        nonlocal macs
        macs += out.numel() * module.weight[0].numel()

    with torch.device("meta"):
        vgg = VGG(config)
        for module in vgg.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        vgg(torch.empty(1, 3, 224, 224))
    assert macs == expected


def test_layers_of_config_c():
    sizes = [layer.kernel_size[0] for layer in make_features("C", width=1) if isinstance(layer, nn.Conv2d)]
    assert sizes == [3, 3, 3, 3, 3, 3, 1, 3, 3, 1, 3, 3, 1]


@pytest.mark.parametrize(
    ("config", "indices"),
    [
        ("D", {1: (0, 2, 4), 2: (5, 7, 9), 3: (10, 12, 14, 16), 4: (17, 19, 21, 23), 5: (24, 26, 28, 30)}),
        ("E", {1: (0, 2, 4), 2: (5, 7, 9), 3: (10, 12, 14, 16, 18), 4: (19, 21, 23, 25, 27), 5: (28, 30, 32, 34, 36)}),
    ],
)
def test_layer_index(config, indices):
    index = layer_index(make_features(config, width=1))
    for block, (*convs, pool) in indices.items():
        for i, conv in enumerate(convs, 1):
            assert index[f"conv{block}_{i}"] == conv
            assert index[f"relu{block}_{i}"] == conv + 1
        assert index[f"pool{block}"] == pool
    assert len(index) == len(make_features(config, width=1))


def test_init():
    torch.manual_seed(0)
    for init, std in {"he": (2 / (64 * 9)) ** 0.5, "normal": 0.01, "glorot": (2 / (128 * 9)) ** 0.5}.items():
        vgg = VGG("B", init=init, hidden=8, num_classes=2)
        assert vgg.features[2].weight.std().item() == pytest.approx(std, rel=0.02)
        assert not vgg.features[2].bias.any()


# ----------------------------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize("config", TABLE_1)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_taps(config, batch_norm):
    """Each tap is what the layers up to it give, and 160x208 has the strides of the paper."""
    vgg = small(config, batch_norm=batch_norm)
    x = torch.randn(2, 3, 160, 208)
    index = layer_index(vgg.features)
    with torch.no_grad():
        taps = vgg.taps(x, index)
        for name, i in index.items():
            x = vgg.features[i](x.clone())
            close(taps[name], x, 1e-4)
            if name.startswith("pool"):
                stride = 2 ** int(name[4:])
                assert x.shape[2:] == (160 // stride, 208 // stride)
    assert (taps["conv4_2"] < 0).any()
    close(taps["relu4_2"], taps["bn4_2" if batch_norm else "conv4_2"].relu())


def test_taps_run_no_further():
    vgg = small()
    vgg.features[19].register_forward_hook(lambda *_: pytest.fail("conv4_2 is after relu4_1"))
    out = vgg.taps(torch.randn(1, 3, 32, 32), ["relu4_1", "relu1_2"])
    assert list(out) == ["relu4_1", "relu1_2"]
    assert vgg.taps(torch.randn(1, 3, 32, 32), []) == {}


def test_taps_have_gradients():
    """Of a convolution that an in-place ReLU follows, too."""
    vgg = small().requires_grad_(False)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    vgg.double()
    assert torch.autograd.gradcheck(lambda x: tuple(vgg.taps(x, ["conv1_1", "relu1_2"]).values()), x, fast_mode=True)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_hooks_on_layers(batch_norm):
    """As style transfer has them: on any layer."""
    vgg, seen = small(batch_norm=batch_norm), []
    for layer in vgg.features:
        layer.register_forward_hook(lambda module, *_: seen.append(module))
    vgg(torch.randn(1, 3, 32, 32))
    assert seen == list(vgg.features)


def test_average_pooling():
    """Pools are other layers; nothing else is."""
    first, second = small(), small(pool="avg")
    second.load_state_dict(first.state_dict())
    changed = [type(a) is not type(b) for a, b in zip(first.features, second.features, strict=True)]
    assert [i for i, c in enumerate(changed) if c] == [4, 9, 16, 23, 30]
    x = torch.randn(1, 3, 64, 64)
    a, b = (vgg.taps(x, ["relu1_2", "pool1"]) for vgg in (first, second))
    close(a["relu1_2"], b["relu1_2"])
    close(b["pool1"], F.avg_pool2d(a["relu1_2"], 2))
    close(a["pool1"], F.max_pool2d(a["relu1_2"], 2))


# --------------------------------------------------------------------------------------------- dense evaluation, inputs


def test_fc_as_conv():
    """At 224 it is the classifier; on a larger map each cell is the classifier on the 7x7 window there."""
    vgg = small()
    dense = fc_as_conv(vgg)
    with torch.no_grad():
        x = torch.randn(1, 3, 224, 224)
        close(dense(vgg.features(x))[:, :, 0, 0], vgg(x))
        maps = torch.randn(2, 32, 8, 9)
        out = dense(maps)
        assert out.shape == (2, 7, 2, 3)
        for i in range(2):
            for j in range(3):
                close(out[:, :, i, j], vgg.classifier(maps[:, :, i : i + 7, j : j + 7].flatten(1)))
    dense[0].weight.data.zero_()
    assert vgg.classifier[0].weight.any()  # a copy


def test_dense_on_an_image_is_the_crop_shifted():
    """Cell (i, j) on 256x288 is the net on the crop moved by 32 (i, j), but for what padding does at its edge: with
    padding taken away the cell is the same exactly."""
    vgg = small("A")
    for layer in vgg.features:
        if isinstance(layer, nn.Conv2d):
            layer.padding = (0, 0)
    dense = fc_as_conv(vgg)
    size = 358  # without padding: 178 after pool1, 88, 42, 19, and 7 after pool5
    with torch.no_grad():
        x = torch.randn(1, 3, size + 32, size + 64)
        whole = dense(vgg.features(x))
        assert whole.shape[2:] == (2, 3)
        crop = dense(vgg.features(x[:, :, 32 : 32 + size, 64 : 64 + size]))
    close(crop[:, :, 0, 0], whole[:, :, 1, 2], 1e-4)


def test_caffe_names():
    vgg, other = small(), small(init="glorot")
    names = {f"features.{i}": name for name, i in layer_index(vgg.features).items() if name.startswith("conv")}
    names |= {"classifier.0": "fc6", "classifier.3": "fc7", "classifier.6": "fc8"}
    caffe = {names[k.rpartition(".")[0]] + "." + k.rpartition(".")[2]: v for k, v in vgg.state_dict().items()}
    assert {"conv1_1.weight", "conv5_3.bias", "fc8.bias"} < caffe.keys()
    other.load_state_dict(from_caffe_names(caffe, other))
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other(x), vgg(x), rtol=0, atol=0)


def test_prepare():
    image = torch.rand(2, 3, 4, 5)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    close(prepare(image), (image - mean) / std)
    bgr = prepare(image, "caffe")
    close(bgr[:, 0], image[:, 2] * 255 - 103.939, 1e-4)
    close(bgr[:, 2], image[:, 0] * 255 - 123.68, 1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VGG("F"), "config must be one of A, B, C, D, E, got 'F'"),
        (lambda: VGG(pool="mean"), "pool must be one of max, avg, got 'mean'"),
        (lambda: VGG(init="zero"), "init must be one of he, normal, glorot, got 'zero'"),
        (lambda: small()(torch.zeros(1, 3, 40, 31)), "at least 32 x 32, got 40 x 31"),
        (lambda: small("A").taps(torch.zeros(1, 3, 32, 32), ["relu1_2"]), "taps must be one of conv1_1, .* 'relu1_2'"),
        (lambda: prepare(torch.zeros(3, 4, 4), "tf"), "weights must be one of torchvision, caffe"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
