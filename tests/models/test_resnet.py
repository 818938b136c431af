"""ResNet against torchvision's, and what its paper says of shortcuts."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import pyzoo
from pyzoo.models.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet, Subsample
from pyzoo.nn import FrozenBatchNorm2d, conv_bn


def randomize_statistics(model: nn.Module) -> nn.Module:
    """Of batch norms, which are 0 and 1 at first, so that it matters what becomes of them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.2, 0.6)
            nn.init.normal_(module.bias, std=0.1)
    return model


@pytest.mark.parametrize(
    ("name", "keys", "buffers"),
    [
        ("resnet18", 122, 9_620),
        ("resnet34", 218, 17_060),
        ("resnet50", 320, 53_173),
        ("resnet101", 626, 105_448),
        ("resnet152", 932, 151_579),
    ],
)
def test_equals_torchvision(name, keys, buffers):
    torch.manual_seed(0)
    peer = randomize_statistics(getattr(torchvision.models, name)()).eval()
    model = pyzoo.create_model(name).eval()
    model.load_state_dict(peer.state_dict())
    peer.load_state_dict(model.state_dict())
    assert len(model.state_dict()) == keys
    assert sum(b.numel() for b in model.buffers()) == buffers
    for size in ((224, 224), (200, 260)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(model(x), peer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_trains_as_torchvision(name):
    torch.manual_seed(0)
    peer = getattr(torchvision.models, name)().double()
    model = pyzoo.create_model(name).double()
    model.load_state_dict(peer.state_dict())
    x, y = torch.randn(4, 3, 64, 64).double(), torch.arange(4)
    for net in (peer, model):
        nn.functional.cross_entropy(net(x), y).backward()
    for (key, expected), actual in zip(peer.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=key)
    torch.testing.assert_close(dict(model.named_buffers()), dict(peer.named_buffers()))


MACS = {
    ("resnet18", False): 1_814_073_344,
    ("resnet34", False): 3_663_761_408,
    ("resnet50", False): 4_089_184_256,
    ("resnet50", True): 3_857_973_248,
    ("resnet101", False): 7_801_405_440,
    ("resnet152", True): 11_282_415_616,
}


def count_macs(model: nn.Module, *size: int) -> int:
    """Multiply-adds of convolutions and linear layers for one image."""
    total = 0

    def add(module, _, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    with torch.device("meta"):
        model.to("meta").eval()(torch.empty(1, *size))
    return total


@pytest.mark.parametrize(("name", "stride_in_1x1"), MACS)
def test_macs(name, stride_in_1x1):
    with torch.device("meta"):
        model = pyzoo.create_model(name, stride_in_1x1=stride_in_1x1)
    assert count_macs(model, 3, 224, 224) == MACS[name, stride_in_1x1]


@pytest.mark.parametrize(
    ("depth", "macs", "option_b"),
    [
        (20, 40_551_040, 272_474),
        (32, 68_862_592, 466_906),
        (44, 97_174_144, 661_338),
        (56, 125_485_696, 855_770),
        (110, 252_887_680, 1_730_714),
    ],
)
def test_cifar(depth, macs, option_b):
    with torch.device("meta"):
        model = CifarResNet(depth)
        assert sum(p.numel() for p in CifarResNet(depth, shortcut="B").parameters()) == option_b
    assert count_macs(model, 3, 32, 32) == macs


def test_taps():
    model = ResNet(Bottleneck, (1, 1, 1, 1), width=8)
    shapes = [tuple(c.shape[1:]) for c in model.features(torch.randn(1, 3, 96, 64))]
    assert shapes == [(32, 24, 16), (64, 12, 8), (128, 6, 4), (256, 3, 2)]
    assert model.out_channels == [32, 64, 128, 256]


@pytest.mark.parametrize(("pad", "first"), [("both", 3), ("end", 0)])
def test_option_a_adds_nothing_to_new_channels(pad, first):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, 8)
    shortcut = Subsample(6, 2, pad)(x)
    assert shortcut.shape == (2, 12, 4, 4)
    torch.testing.assert_close(shortcut[:, first : first + 6], x[:, :, ::2, ::2], rtol=0, atol=0)
    new = [c for c in range(12) if not first <= c < first + 6]
    assert not shortcut[:, new].any()


def test_a_block_may_begin_as_the_identity():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (2, 1, 1, 1), width=8, zero_init_residual=True)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(model.layer1[1](x), x.relu(), rtol=0, atol=0)


def test_plain_net_adds_nothing():
    torch.manual_seed(0)
    plain, residual = CifarResNet(8, shortcut=None), CifarResNet(8)
    residual.load_state_dict(plain.state_dict())
    block = plain.layer1[0]
    x = torch.randn(2, 16, 6, 6)
    expected = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    torch.testing.assert_close(block(x), expected.relu())
    torch.testing.assert_close(residual.layer1[0](x), (expected + x).relu())


@pytest.mark.parametrize("depth", [6, 21, 2])
def test_impossible_depth(depth):
    with pytest.raises(ValueError, match=f"depth must be 6n \\+ 2.*got {depth}"):
        CifarResNet(depth)


# --------------------------------------------------------------------------------------------- convolution + batch norm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_conv_bn(norm, bias):
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(4, 6, 3, 2, 1, bias=bias).double(), norm(6).double().eval()
    for tensor in bn.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    other = copy.deepcopy((conv, bn))
    x = torch.randn(2, 4, 7, 9).double().requires_grad_()
    actual, expected = conv_bn(x, conv, bn), other[1](other[0](x))
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, [x, *conv.parameters(), *bn.parameters()], grad),
        torch.autograd.grad(expected, [x, *other[0].parameters(), *other[1].parameters()], grad),
    )


def test_conv_bn_sees_new_weights():
    """What inference keeps is dropped when a weight or statistic changes, however that comes about."""
    torch.manual_seed(0)
    conv, bn, x = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5).eval(), torch.randn(1, 3, 6, 6)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(conv_bn(x, conv, bn), bn(conv(x)))

    check()
    bn.running_var.fill_(3)
    check()
    bn.train()(conv(x))
    bn.eval()
    check()
    with torch.no_grad():
        conv.weight.mul_(2)
    check()
    conv.weight.data = torch.randn(5, 3, 3, 3)
    check()
    conv.load_state_dict(nn.Conv2d(3, 5, 3).state_dict())
    check()
    torch.optim.SGD(conv.parameters(), 0.1)
    conv.double(), bn.double()
    x = x.double()
    check()
    with torch.inference_mode():
        check()


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}])
def test_conv_bn_in_training(options):
    """The statistics are those of the batch, and move as those of the module do."""
    conv, bn, x = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, **options), torch.randn(2, 3, 6, 6)
    other = copy.deepcopy(bn)
    for step in range(1, 4):
        torch.testing.assert_close(conv_bn(x * step, conv, bn), other(conv(x * step)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bn.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)
    bn.eval(), other.eval()
    torch.testing.assert_close(conv_bn(x, conv, bn), other(conv(x)), rtol=1e-5, atol=1e-5)


def test_conv_bn_runs_hooks():
    conv, bn, seen = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5).eval(), []
    conv.register_forward_hook(lambda *args: seen.append("conv"))
    bn.register_forward_hook(lambda *args: seen.append("bn"))
    conv_bn(torch.randn(2, 3, 6, 6), conv, bn)
    assert seen == ["conv", "bn"]


def test_conv_bn_under_transforms():
    torch.manual_seed(0)
    conv, bn, x = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5).eval(), torch.randn(4, 2, 3, 6, 6)
    with torch.no_grad():
        vmapped = torch.vmap(lambda y: conv_bn(y, conv, bn))(x)
        torch.testing.assert_close(vmapped.flatten(0, 1), bn(conv(x.flatten(0, 1))))

    def loss(weight, function):
        modules = nn.ModuleList([conv, bn])
        modules.forward = lambda: function(x[0], conv, bn).square().sum()
        return torch.func.functional_call(modules, {"0.weight": weight}, ())

    weight = torch.randn(5, 3, 3, 3)
    actual = torch.func.grad(loss)(weight, conv_bn)
    expected = torch.func.grad(loss)(weight, lambda y, conv, bn: bn(conv(y)))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("how", ["compile", "export"])
def test_compiles_and_exports(how):
    torch.manual_seed(0)
    model = randomize_statistics(ResNet(Bottleneck, (1, 1, 1, 1), 10, width=8)).eval()
    x = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        if how == "compile":
            graph = torch.compile(model, fullgraph=True)
        else:
            batch = torch.export.Dim("batch", min=1, max=64)
            graph = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(graph(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)
