"""pyzoo.accelerate: swaps what it should, changes nothing else, and can be undone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pyzoo
from pyzoo.nn import DepthwiseConv2d


class Scaled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def depthwise(channels=4, **kwargs):
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, **kwargs)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), depthwise(), nn.BatchNorm2d(4), nn.Sequential(depthwise(stride=2)))


X = torch.randn(2, 3, 9, 10, generator=torch.Generator().manual_seed(1))


def test_swaps_in_place_and_keeps_everything():
    net = model()
    before, modules, parameters = net(X), list(net.modules()), list(net.parameters())
    keys, calls = list(net.state_dict()), []
    net[1].register_forward_hook(lambda *_: calls.append(1))
    net[3].eval()
    report = pyzoo.accelerate(net)
    assert report.model is net
    assert list(report.swapped) == ["1", "3.0"]
    assert report.left == {}
    assert [type(m) for m in net.modules()].count(DepthwiseConv2d) == 2
    assert type(net[0]) is nn.Conv2d
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == keys
    assert net[1].training
    assert not net[3].training
    torch.testing.assert_close(net(X), before)
    assert calls == [1]
    assert "1    torch.Conv2d -> pyzoo.nn.DepthwiseConv2d" in repr(report)
    report.undo()
    assert not any(isinstance(m, DepthwiseConv2d) for m in net.modules())
    assert "undone" in repr(report)
    report.undo()


def test_context_manager_and_copy():
    net = model()
    with pyzoo.accelerate(net):
        assert type(net[1]) is DepthwiseConv2d
    assert type(net[1]) is nn.Conv2d
    report = pyzoo.accelerate(net, inplace=False)
    assert type(net[1]) is nn.Conv2d
    assert type(report.model[1]) is DepthwiseConv2d
    torch.testing.assert_close(report.model(X), net(X))


def test_a_swapped_model_can_be_copied_pickled_and_loaded():
    net = model()
    pyzoo.accelerate(net)
    want = net(X)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin[1]) is DepthwiseConv2d
        torch.testing.assert_close(twin(X), want)
    plain = model()
    plain.load_state_dict(net.state_dict())
    net.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"stride": 2}, {"dilation": 2}, {"dtype": torch.float64}])
def test_every_depthwise_convolution(mode, options):
    torch.manual_seed(0)
    conv = depthwise(padding_mode=mode, **options)
    x = torch.randn(2, 4, 9, 10, dtype=conv.weight.dtype)
    want = conv(x)
    with pyzoo.accelerate(conv) as report:
        assert list(report.swapped) == [""]
        torch.testing.assert_close(conv(x), want)
        torch.testing.assert_close(conv(x[0]), want[0])


def test_multiplier_and_same_padding():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, (5, 3), padding="same", groups=4)
    want = conv(torch.ones(1, 4, 6, 6))
    with pyzoo.accelerate(conv):
        torch.testing.assert_close(conv(torch.ones(1, 4, 6, 6)), want)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:FutureWarning")
def test_what_is_left_and_why():
    torch.manual_seed(0)
    replaced = depthwise()
    replaced.forward = lambda input: input
    parametrized = depthwise()
    parametrize.register_parametrization(parametrized, "weight", Double())
    net = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(4, 8, 3, groups=2),
            "one_channel": nn.Conv2d(1, 8, 3),
            "subclass": Scaled(4, 4, 3, groups=4),
            "replaced": replaced,
            "parametrized": parametrized,
            "complex": depthwise(dtype=torch.complex64),
            "meta": depthwise(device="meta"),
            "ours": DepthwiseConv2d(4, 3),
            "compiled": torch.compile(nn.Sequential(depthwise())),
            "scripted": torch.jit.trace(depthwise(), torch.ones(1, 4, 5, 5)),
        }
    )
    kinds = [type(m) for m in net.modules()]
    report = pyzoo.accelerate(net)
    assert not report.swapped
    assert [type(m) for m in net.modules()] == kinds
    reasons = {
        "subclass": "it is a subclass, .*Scaled",
        "replaced": "its forward was replaced on the instance",
        "parametrized": "it is parametrized: accelerate first",
        "complex": "its weight is torch.complex64",
        "meta": "its weight is on meta",
        "ours": "it is pyzoo's already",
        "compiled._orig_mod.0": "compiled by torch.compile: accelerate first",
    }
    assert report.left.keys() == reasons.keys()
    for name, reason in reasons.items():
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(report.left[name])
        assert f"left: {report.left[name]}" in repr(report)


def test_module_compiled_in_place():
    net = model()
    net.compile()
    assert "1" in pyzoo.accelerate(net).left


def test_accelerated_model_compiles():
    net = model().eval()
    want = net(X)
    pyzoo.accelerate(net)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(X), want)


def test_shared_module_has_all_its_names():
    conv = depthwise()
    net = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv)})
    report = pyzoo.accelerate(net)
    assert list(report.swapped) == ["a", "b.0"]
    assert net["a"] is net["b"][0]
    assert list(pyzoo.accelerate(net).left) == ["a", "b.0"]
    report.undo()
    assert type(conv) is nn.Conv2d


def test_parametrized_after_swapping():
    torch.manual_seed(0)
    conv, x = depthwise(), torch.randn(1, 4, 6, 6)
    report = pyzoo.accelerate(conv)
    parametrize.register_parametrization(conv, "weight", Double())
    want = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1, groups=4)
    torch.testing.assert_close(conv(x), want)
    report.undo()  # it has another class by now, which must stay
    torch.testing.assert_close(conv(x), want)
    parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is DepthwiseConv2d


def test_weight_norm_hook():
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(depthwise())
    x = torch.randn(1, 4, 6, 6)
    want = conv(x)
    with pyzoo.accelerate(conv) as report:
        assert report.swapped
        torch.testing.assert_close(conv(x), want)


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"^accelerate: model must be a torch\.nn\.Module, got int"):
        pyzoo.accelerate(3)


# --------------------------------------------------------------------------------------------------- whole torchvision


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_mobilenet(memory_format):
    """The gradients in float64: in float32, what rounding does to one ReLU6 goes through 50 batch normalisations."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2(num_classes=10).to(memory_format=memory_format).eval()
    net.classifier[0].p = 0.0
    x = torch.randn(2, 3, 96, 96).contiguous(memory_format=memory_format)

    def training_step(net):
        net = copy.deepcopy(net).double().train()
        out = net(x.double())
        out.square().mean().backward()
        return [out, *(p.grad for p in net.parameters()), *net.buffers()]

    with torch.no_grad():
        want = net(x)
    want_step = training_step(net)
    report = pyzoo.accelerate(net)
    assert len(report.swapped) == 17
    assert not report.left
    with torch.no_grad():
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(training_step(net), want_step, rtol=1e-8, atol=1e-10)


def test_detection_model():
    pytest.importorskip("torchvision")
    from torchvision.models import detection

    torch.manual_seed(0)
    net = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5).eval()
    image = torch.rand(3, 200, 240)
    with torch.no_grad():
        (want,) = net([image])
        with pyzoo.accelerate(net) as report:
            assert report.swapped == {
                "roi_heads.box_roi_pool": "torchvision.MultiScaleRoIAlign -> pyzoo.nn.MultiScaleRoIAlign"
            }
            (got,) = net([image])
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-3)


def test_roi_modules():
    ops = pytest.importorskip("torchvision.ops")
    x, boxes = torch.randn(1, 3, 12, 12), torch.tensor([[0, 1.0, 1, 9, 8]])
    for module in (ops.RoIAlign(3, 0.5, 2, aligned=True), ops.RoIPool(3, 0.5)):
        want = module(x, boxes)
        with pyzoo.accelerate(module) as report:
            assert type(module).__module__.startswith("pyzoo")
            torch.testing.assert_close(module(x, boxes), want)
            assert report.swapped
        assert type(module).__module__.startswith("torchvision")
        model = nn.Sequential(module, nn.Linear(1, 1, device="meta"))
        assert "not on the CPU" in pyzoo.accelerate(model).left["0"]
