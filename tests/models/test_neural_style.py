"""Neural style transfer: the net and its weights, losses and gradients by the paper's formulas, tiles, search, colors,
the command."""

from __future__ import annotations

import re
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pyzoo import cli
from pyzoo.data import read_picture, write_picture
from pyzoo.models._style_tiles import halo_of
from pyzoo.models.neural_style import (
    PAPER,
    PORT,
    RANDOM,
    STYLE,
    Objective,
    StyleNet,
    content_inversion,
    match_colors,
    noise,
    rescale,
    style_net,
    style_transfer,
    texture_synthesis,
)
from pyzoo.models.vgg import layer_index, prepare
from pyzoo.nn.conv import forget

CONVS = [f"conv{b}_{i}" for b, n in enumerate((2, 2, 4, 4, 4), 1) for i in range(1, n + 1)]


def tiny(seed: int = 0, **options) -> StyleNet:
    """A net of an eighth of the width, with positive and negative biases."""
    torch.manual_seed(seed)
    net = StyleNet(width=8, **options).requires_grad_(False)
    for layer in net.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.orthogonal_(layer.weight.contiguous(), 2**0.5)
            nn.init.normal_(layer.bias, 0, 0.1)
    return net


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Smooth color fields with some noise."""
    generator = torch.Generator().manual_seed(3)
    small = [torch.rand(1, 3, 6, 7, generator=generator) for _ in sizes]
    smooth = [F.interpolate(x, size, mode="bilinear")[0] for x, size in zip(small, sizes, strict=True)]
    return [(x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1) for x in smooth]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------------ net


def test_layers():
    with torch.device("meta"):
        net = StyleNet()
    convs = [m for m in net.features if isinstance(m, nn.Conv2d)]
    up_to = net.features[: net.index["conv5_1"]]
    assert sum(p.numel() for p in net.parameters()) == 20_024_384
    assert sum(p.numel() for p in up_to.parameters()) == 12_944_960
    assert list(net.index) == CONVS
    assert len(convs) == 16
    assert not any(isinstance(m, nn.MaxPool2d) for m in net.modules())
    assert [net.index[name] - 1 for name in CONVS] == [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]
    style = [net.features[net.index[name] - 1].out_channels for name in STYLE]
    assert sum(n * (n + 1) // 2 for n in style) == 305_888
    maps = net(torch.empty(1, 3, 67, 95, device="meta"))
    assert [list(maps[f"conv{b}_1"].shape) for b in range(1, 6)] == [
        [1, 64, 67, 95], [1, 128, 33, 47], [1, 256, 16, 23], [1, 512, 8, 11], [1, 512, 4, 5],
    ]  # fmt: skip


def test_maps_of_torchvision():
    """With torchvision's random weights and its max pooling, every map is the same."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    theirs = models.vgg19(num_classes=2).features.eval()
    ours = StyleNet(pool="max")
    ours.load_state_dict({f"features.{k}": v for k, v in theirs.state_dict().items()})
    image = torch.rand(1, 3, 64, 81)
    with torch.no_grad():
        maps, x = ours(image), prepare(image)
        for i, layer in enumerate(theirs):
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                name = CONVS[list(ours.index.values()).index(i)]
                close(maps[name], x.clone())
    other = StyleNet()
    other.load_state_dict(ours.state_dict())
    with torch.no_grad():
        average = other(image)
    close(average["conv1_2"], maps["conv1_2"])
    assert (average["conv2_1"] - maps["conv2_1"]).abs().max() > 1e-3


def test_runs_no_further_than_it_must():
    net = tiny()
    net.features[net.index["conv3_1"] + 1].register_forward_hook(lambda *_: pytest.fail("conv3_2 was not asked for"))
    assert list(net(torch.rand(1, 3, 8, 8), ["conv3_1", "conv1_2"])) == ["conv3_1", "conv1_2"]


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 1, 32, 32), torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)]
)
def test_net_refuses_other_images(images):
    """Not grey ones, which would pass as three colors, nor bytes, as they are up to 255."""
    with pytest.raises(ValueError, match=r"^StyleNet: images must be \[N, 3, H, W\] of a floating dtype, .* got \["):
        tiny()(images)


@pytest.mark.parametrize("names", ["torchvision", "caffe"])
def test_weights_in_files(tmp_path, names):
    """Of whichever layout: the same net, and the input that the layout wants."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    net = StyleNet(inputs=names)
    state = net.state_dict()
    if names == "caffe":
        convs = {f"features.{i}": name for name, i in layer_index(net.features).items()}
        state = {f"{convs[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in state.items()}
        assert "conv5_4.bias" in state
    else:
        with torch.device("meta"):
            head = models.vgg19().classifier
        state |= {f"classifier.{k}": torch.zeros(1).expand(v.shape) for k, v in list(head.state_dict().items())[-1:]}
    torch.save(state, tmp_path / "vgg19.pth")
    loaded = style_net(tmp_path / "vgg19.pth")
    assert loaded.inputs == names
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        close(loaded(image)["conv5_4"], net(image)["conv5_4"])
        scaled = style_net(tmp_path / "vgg19.pth", [image[0]])(image)
    close(scaled["conv1_1"].mean((0, 2, 3)), torch.ones(64), 1e-3)


def test_wrong_weights(tmp_path):
    torch.save(nn.Conv2d(3, 64, 3).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit StyleNet: missing"):
        style_net(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError):
        style_net(tmp_path / "none.pth")


def test_rescaling_divides_maps_by_their_means():
    images = pictures((48, 64), (35, 90))
    net, scaled = tiny().double(), tiny().double()
    images = [image.double() for image in images]
    rescale(scaled, images, floor=0)
    before, after = ([model(image[None]) for image in images] for model in (net, scaled))
    for name in CONVS:
        old, new = ([maps[name].flatten(2) for maps in both] for both in (before, after))
        old, new = torch.cat(old, 2), torch.cat(new, 2)
        mean = old.mean((0, 2))
        alive = mean > 0
        assert alive.sum() > len(alive) / 4
        close(new.mean((0, 2))[alive], torch.ones_like(mean[alive]), 1e-8)
        close(new[:, alive], (old / mean[:, None])[:, alive], 1e-8)


def test_random_filters():
    """All of them are active at some places and not at others, even in the deepest layer."""
    images = pictures((64, 96), (80, 64))
    net = style_net(None, images, seed=1)
    for name, maps in net(images[0][None]).items():
        active = (maps > 0).float().mean((0, 2, 3))
        assert ((active > 0.02) & (active < 0.98)).float().mean() > 0.9, name
        assert 0.5 < maps.mean() < 2, name
    again, other = style_net(None, images, seed=1), style_net(None, images, seed=2)
    assert torch.equal(again.features[28].weight, net.features[28].weight)
    assert not torch.equal(other.features[0].weight, net.features[0].weight)


def test_rescaling_without_anything_to_see():
    """Pictures of one pixel, and filters that are dead."""
    net = tiny()
    rescale(net, [torch.rand(3, 1, 1)])
    rescale(net, [torch.rand(3, 40, 2)], compensate=False)
    net.features[2].weight.zero_()
    net.features[2].bias.zero_()
    rescale(net, [torch.rand(3, 40, 40)], floor=0)
    assert all(p.isfinite().all() for p in net.parameters())


# --------------------------------------------------------------------------------------------------------------- losses


def plain_losses(net, image, content, style, content_layers, style_layers, content_loss):
    """Equations 1, 3, 4 and 5 as they stand, but with M' positions of the style."""
    maps, targets, styles = net(image), net(content), net(style)
    c = s = 0.0
    for name, w in content_layers.items():
        square = (maps[name] - targets[name]).square()
        c = c + w * (square.sum() / 2 if content_loss == "sum" else square.mean())
    for name, w in style_layers.items():
        f, g = maps[name][0].flatten(1), styles[name][0].flatten(1)
        n, m = f.shape
        s = s + w / (4 * n**2 * m**2) * (f @ f.T - g @ g.T * (m / g.shape[1])).square().sum()
    return c, s


@pytest.mark.parametrize("content_loss", ["mean", "sum"])
@pytest.mark.parametrize("tile", [None, 16, 33, 1000])
def test_losses_and_gradient(tile, content_loss):
    """Those of the formulas in float64; in tiles of any size, too, and in pictures that no tile size divides."""
    net = tiny().double()
    content, style = (x[None].double() for x in pictures((149, 103), (50, 77)))
    layers = {"conv4_2": 0.5, "conv1_2": 0.1}, {**STYLE, "conv2_2": 3.0}
    image = torch.rand_like(content).requires_grad_()
    expected = plain_losses(net, image, content, style, *layers, content_loss)
    gradient = torch.autograd.grad(sum(expected), image)[0]
    losses = Objective(net, content, style, *layers, content_loss, tile).backward(image)
    assert losses["content"] == pytest.approx(expected[0].item(), rel=1e-10)
    assert losses["style"] == pytest.approx(expected[1].item(), rel=1e-10)
    close(image.grad / gradient.abs().max(), gradient / gradient.abs().max(), 1e-10)


def test_gradient_in_the_maps():
    """Equations 2 and 6: w (F - P), and w (G - A) F / (N M)^2, where F is above zero."""
    net = tiny().double()
    content, style, image = (x[None].double() for x in pictures((24, 32), (24, 32), (24, 32)))
    image.requires_grad_()
    pre = {}
    conv = net.features[net.index["conv3_1"] - 1]
    conv.register_forward_hook(lambda _, __, out: pre.update(out=out) or out.clone())
    for part in ("content", "style"):
        wanted = ({"conv3_1": 2.0}, {}) if part == "content" else ({}, {"conv3_1": 2.0})
        f, p, s = (net(x, ["conv3_1"])["conv3_1"] for x in (image, content, style))
        f_flat, s_flat = f[0].flatten(1), s[0].flatten(1)
        n, m = f_flat.shape
        by_style = ((f_flat @ f_flat.T - s_flat @ s_flat.T) @ f_flat / (n * m) ** 2).view_as(f)
        in_maps = 2 * torch.where(f > 0, f - p if part == "content" else by_style, 0)
        net(image, ["conv3_1"])
        expected = torch.autograd.grad(pre["out"], image, in_maps)[0]
        Objective(net, content, style, *wanted, "sum").backward(image)
        close(image.grad, expected, 1e-12)


def test_a_step_keeps_maps_and_little_more():
    """Not the gradients of all losses at once, which would be half as much again."""
    image = pictures((192, 256))[0][None].requires_grad_()
    net = tiny()
    objective = Objective(net, image.detach(), image.detach(), {"conv4_2": 1.0}, STYLE)
    with torch.no_grad():
        kept = sum(maps.nbytes for name, maps in net(image).items() if name <= "conv5_1")
    forget(net)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective.backward(image)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    peak = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    assert kept < peak < 1.4 * kept  # 1.3: with outputs of pools, and the two gradients of a layer


@pytest.mark.parametrize("tile", [None, 32])
def test_a_picture_is_like_itself(tile):
    net = tiny()
    content, style = (x[None] for x in pictures((60, 50), (60, 50)))
    objective = Objective(net, content, style, {"conv4_2": 1.0}, STYLE, tile=tile)
    assert objective.backward(content.clone().requires_grad_())["content"] < 1e-10
    assert objective.backward(style.clone().requires_grad_())["style"] < 1e-10


def test_style_does_not_see_places():
    """Shuffled pixels have the same Gram matrix in the first layer of a net of 1x1 filters, and another content."""
    net = tiny()
    net.features[0].weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    (style,) = (x[None] for x in pictures((20, 30)))
    shuffled = style.flatten(2)[:, :, torch.randperm(600)].view_as(style).requires_grad_()
    losses = Objective(net, style, style, {"conv1_1": 1.0}, {"conv1_1": 1.0}).backward(shuffled)
    assert losses["style"] < 1e-10
    assert losses["content"] > 1e-3


def test_halo():
    """A pixel beyond the halo changes nothing in the core, one inside may."""
    net = tiny().double()
    assert halo_of(net, ["conv5_1", "conv1_1"]) == (16, 80)
    assert halo_of(net, ["conv1_1"]) == (1, 1)
    assert halo_of(net, ["conv3_1"]) == (4, 12)
    image = torch.rand(1, 3, 64, 8, dtype=torch.float64, requires_grad=True)
    net(image, ["conv3_1"])["conv3_1"][0, :, 8].sum().backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()  # the cell has rows 32 to 35
    assert (rows.min().item(), rows.max().item()) == (32 - 10, 35 + 10)


@pytest.mark.parametrize("preset", [PAPER, PORT, RANDOM])
def test_presets(preset):
    content, style = pictures((33, 40), (40, 33))
    image, losses = style_transfer(content, style, tiny(), steps=3, **preset)
    assert image.shape == content.shape
    assert len(losses) == 3
    if preset is PORT:  # 1000 times the mean squared difference of F F^T / (N M), and a mean
        net = StyleNet().requires_grad_(False)
        picture = content[None].clone().requires_grad_()
        actual = Objective(net, content[None], style[None], PORT["content_layers"], PORT["style_layers"])
        grams = [
            [m[0].flatten(1) @ m[0].flatten(1).T / m[0].numel() for m in net(x[None], STYLE).values()]
            for x in (content, style)
        ]
        expected = 1000 * sum(F.mse_loss(a, b) for a, b in zip(*grams, strict=True))
        assert actual.backward(picture)["style"] == pytest.approx(expected.item(), rel=1e-3)


# --------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
@pytest.mark.parametrize("init", ["content", "noise", "style"])
def test_losses_fall(optimizer, init):
    content, style = pictures((40, 56), (48, 40))
    net = tiny()
    rescale(net, [content, style], compensate=False)
    image, losses = style_transfer(content, style, net, steps=30, optimizer=optimizer, init=init)
    assert [entry["step"] for entry in losses] == list(range(1, 31))
    assert losses[-1]["loss"] < 0.6 * losses[0]["loss"]
    assert losses[0]["loss"] == pytest.approx(losses[0]["content"] + losses[0]["style"])
    assert image.shape == content.shape
    assert not image.requires_grad


def test_weights_of_any_scale():
    """Constants of the optimizers do not matter: the same picture for all weights times 1e-6."""
    content, style = pictures((32, 32), (32, 32))
    net = tiny()
    for optimizer in ("lbfgs", "adam"):
        one, other = (
            style_transfer(
                content, style, net, steps=10, optimizer=optimizer,
                content_layers={"conv3_1": scale}, style_layers={"conv1_1": 9 * scale},
            )[0]
            for scale in (1.0, 2.0**-20)
        )  # fmt: skip
        close(one, other, 1e-3)
        assert (one - content).abs().max() > 0.01


def test_more_weight_on_the_content_keeps_more_of_it():
    content, style = pictures((40, 48), (40, 48))
    net = tiny()
    rescale(net, [content, style], compensate=False)
    ends = []
    for w in (0.0, 0.1, 10.0):
        image, losses = style_transfer(content, style, net, steps=40, init="noise", content_layers={"conv2_2": w})
        alone = Objective(net, content[None], None, {"conv2_2": 1.0}, {}).backward(image[None].requires_grad_())
        ends.append((alone["content"], losses[-1]["style"]))
    assert ends[0][0] > ends[1][0] > ends[2][0]
    assert ends[0][1] < ends[1][1] < ends[2][1]


def test_texture_and_inversion():
    content, style = pictures((40, 48), (33, 40))
    net = tiny()
    rescale(net, [content, style], compensate=False)
    texture, losses = texture_synthesis(style, net, (20, 52), steps=20)
    assert texture.shape == (3, 20, 52)
    assert losses[-1]["style"] < 0.5 * losses[0]["style"]
    assert losses[0]["content"] == 0
    assert texture_synthesis(style, net, steps=1)[0].shape == style.shape
    errors = []
    for layer in ("conv1_1", "conv4_1"):
        image, _ = content_inversion(content, net, layer, steps=40)
        errors.append((image - content).square().mean().item())
    assert errors[0] < errors[1] / 2


def test_same_seed_same_picture():
    content, style = pictures((32, 32), (32, 32))
    net = tiny()
    run = [style_transfer(content, style, net, steps=3, init="noise", seed=seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(run[0], run[1])
    assert not torch.equal(run[0], run[2])
    assert noise((500, 500), net).std(dim=(0, 2, 3)).mul(255).sub(30).abs().max() < 0.2


def test_tiles_change_nothing():
    content, style = pictures((70, 100), (64, 64))
    net = tiny().double()
    content, style = content.double(), style.double()
    whole, tiled = (style_transfer(content, style, net, steps=8, tile=tile)[0] for tile in (None, 32))
    close(whole, tiled, 1e-6)


def test_tiles_bound_what_the_net_sees():
    net, seen = tiny(), []
    net.features[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[2:]))
    content, style = pictures((300, 500), (200, 300))
    style_transfer(content, style, net, steps=1, tile=64, style_layers={"conv3_1": 1.0}, content_layers={})
    assert seen
    assert max(max(size) for size in seen) <= 64 + 2 * 12


def test_start_from_a_picture_and_callback():
    content, style = pictures((40, 56), (48, 40))
    start, seen = torch.full((3, 10, 14), 0.25), []
    image, losses = style_transfer(
        content, style, tiny(), steps=2, init=start, callback=lambda *args: seen.append(args), optimizer="adam", lr=1e-9
    )
    close(image, torch.full_like(content, 0.25), 1e-4)
    assert [step for step, _, _ in seen] == [1, 2]
    assert seen[1][1] == losses[1]
    assert torch.equal(seen[1][2], image)


# --------------------------------------------------------------------------------------------------------------- colors


def test_matched_colors():
    content, style = (x[None] for x in pictures((40, 56), (48, 40)))
    matched = match_colors(style, content)
    close(matched.mean((0, 2, 3)), content.mean((0, 2, 3)))
    close(matched[0].flatten(1).cov(correction=0), content[0].flatten(1).cov(correction=0), 1e-4)
    close(match_colors(style, style), style, 1e-4)
    grey = torch.full_like(style, 0.5)
    assert match_colors(grey, content).isfinite().all()
    close(match_colors(style, grey), grey, 0.05)


def test_luminance_alone_is_transferred():
    """Differences of channels, which are color, stay those of the content."""
    content, style = pictures((40, 56), (48, 40))
    image, _ = style_transfer(content, style, tiny(), steps=5, color="luminance")
    close(image[0] - image[1], content[0] - content[1])
    close(image[1] - image[2], content[1] - content[2])
    assert (image - content).abs().max() > 0.01
    assert style_transfer(content, style, tiny(), steps=5, color="match")[0].shape == content.shape


# ------------------------------------------------------------------------------------------------------------ bad input

GOOD = torch.full((3, 40, 40), 0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"content": GOOD[None]}, ValueError, r"content must be of shape \[3, H, W\], got \[1, 3, 40, 40\]"),
        ({"style": GOOD[:1]}, ValueError, r"style must be of shape \[3, H, W\], got \[1, 40, 40\]"),
        ({"content": (GOOD * 255).byte()}, TypeError, "content must be a tensor of a floating dtype, got torch.uint8"),
        ({"style": "wave.jpg"}, TypeError, "style must be a tensor of a floating dtype, got str"),
        ({"content": GOOD[:, :1, :1]}, ValueError, "content must be at least 16 x 16 for conv5_1, got .1, 1"),
        (
            {"content": GOOD[:, :9, :7], "style": None},
            ValueError,
            "content must be at least 8 x 8 for conv4_2, got .9, 7",
        ),
        ({"content": None, "init": GOOD[:, :9]}, ValueError, "init must be at least 16 x 16 for conv5_1, got .9, 40"),
        ({"content": GOOD[:, :0]}, ValueError, "content must be at least 16 x 16 for conv5_1, got .0, 40"),
        ({"style": GOOD[:, :, :15]}, ValueError, "style must be at least 16 x 16 for conv5_1, got .40, 15"),
        ({"content": GOOD / 0}, ValueError, "content must be finite"),
        ({"content": None, "style": None}, ValueError, "content, style must be a picture and layers of it"),
        ({"content": None}, ValueError, "init must be 'noise' or a picture that is given, got 'content'"),
        ({"init": "random"}, ValueError, "init must be 'noise' or a picture that is given, got 'random'"),
        ({"style": None, "color": "match"}, ValueError, "color must be None without both pictures"),
        ({"color": "hue"}, ValueError, "color must be None, 'match' or 'luminance', got 'hue'"),
        ({"optimizer": "sgd"}, ValueError, "optimizer must be one of lbfgs, adam, got 'sgd'"),
        ({"content_loss": "max"}, ValueError, "content_loss must be 'mean' or 'sum', got 'max'"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"tile": 0}, ValueError, "tile must be None or at least 1, got 0"),
        ({"style_layers": {"relu1_1": 1}}, ValueError, "style_layers must be weights of some of conv1_1.*'relu1_1'"),
        (
            {"content_layers": {"conv1_1": -1}},
            ValueError,
            r"content_layers\['conv1_1'\] must be finite and not negative",
        ),
        ({"content_layers": {}, "style_layers": {}}, ValueError, "a picture and layers of it, one at least"),
        (
            {"content_layers": {"conv1_1": 0}, "style_layers": {"conv1_1": 0}},
            ValueError,
            "a picture and layers of it, one at least with a weight above 0",
        ),
        ({"lr": 1e30, "optimizer": "adam"}, FloatingPointError, "not finite after step 2; try a smaller lr"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=f"^style_transfer: .*{message}"):
        style_transfer(**{"content": GOOD, "style": GOOD.flip(0) ** 2, "net": tiny(), "steps": 2, **arguments})


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (7, 3)])
def test_pictures_of_few_pixels(size):
    """Are enough for layers that see them."""
    (content,) = pictures(size)
    layers = {"content_layers": {"conv1_2": 0.1}, "style_layers": {"conv1_1": 1.0}}
    image, _ = style_transfer(content, GOOD, style_net(None, [content, GOOD]), steps=3, **layers)
    assert image.shape == content.shape
    assert image.isfinite().all()


# -------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def folder(tmp_path):
    content, style = pictures((40, 60), (60, 40))
    write_picture(content, tmp_path / "content.png")
    write_picture(style, tmp_path / "style.png")
    return tmp_path


def style_command(folder, *arguments, content="content.png", out="out.png"):
    paths = [str(folder / content), str(folder / "style.png"), "-o", str(folder / out)]
    return cli.main(["style", *paths, "--steps", "2", "--size", "48", *arguments])


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--init", "noise", "--optimizer", "adam", "--tile", "16"],
        ["--color", "luminance", "--style-layers", "conv1_1=0.5, conv2_1", "--content-layers", "conv3_2=0.1"],
    ],
)
def test_command(folder, capsys, options):
    assert style_command(folder, *options, out="new/out.jpg") == 0
    assert read_picture(folder / "new" / "out.jpg").shape == (3, 32, 48)
    captured = capsys.readouterr()
    assert "48 x 32" in captured.out
    assert "2/2" in captured.err


def test_command_goes_on_from_a_picture(folder, monkeypatch, capsys):
    """Interrupted, it keeps what it has."""
    from pyzoo.models import neural_style

    def interrupted(content, style, net, *, callback, **options):
        callback(1, {"content": 0.0, "style": 1.0}, torch.zeros_like(content))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(neural_style, "style_transfer", interrupted)
        assert style_command(folder) == 130
    assert "not finished" in capsys.readouterr().out
    assert not read_picture(folder / "out.png").any()
    assert style_command(folder, "--init", str(folder / "out.png")) == 0


def test_command_interrupted_before_the_first_step(folder, monkeypatch, capsys):
    """What is in the file already, maybe what it was to go on from, is left there."""
    from pyzoo.models import neural_style

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("style_transfer", "style_net"):
        with monkeypatch.context() as patch:
            patch.setattr(neural_style, name, interrupted)
            write_picture(torch.ones(3, 4, 5), folder / "out.png")
            assert style_command(folder, "--init", str(folder / "out.png")) == 130
        assert "pyzoo: interrupted" in capsys.readouterr().err
        assert (read_picture(folder / "out.png") == 1).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_command_takes_pictures_of_any_kind(folder, mode):
    image = pytest.importorskip("PIL.Image")
    ramp = np.arange(30 * 45).reshape(30, 45)
    name = "other.tif" if mode == "CMYK" else "other.png"
    if mode == "I;16":
        image.fromarray((ramp * 48).astype(np.uint16)).save(folder / name)
        assert 0.4 < read_picture(folder / name).mean() < 0.6
    else:
        image.fromarray((ramp % 256).astype(np.uint8)).convert(mode).save(folder / name)
    assert style_command(folder, content=name) == 0
    assert read_picture(folder / "out.png").shape == (3, 30, 45)


def test_transparent_is_white(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGBA", (4, 3), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png") == 1).all()


def test_pictures_are_turned_and_shrunk(tmp_path):
    image = pytest.importorskip("PIL.Image")
    exif = image.Exif()
    exif[0x112] = 6  # a quarter turn
    image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (3, 40, 20)
    assert read_picture(tmp_path / "turned.jpg", 10).shape == (3, 10, 5)
    assert read_picture(tmp_path / "turned.jpg", 100).shape == (3, 40, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"content": "none.png"}, "No such file"),
        ({"content": "text.png"}, "cannot identify image file"),
        ({"content": "cut.png"}, "cannot read .*cut.png: "),
        ({"content": "float.tif"}, "cannot read .*float.tif: it has 32 bits a pixel"),
        ({"content": "int.tif"}, "cannot read .*int.tif: it has 32 bits a pixel"),
        ({"content": "dot.png"}, "content must be at least 4 x 4 for conv3_1, got .1, 1"),
        ({"content": "line.png"}, r"content must be at least 4 x 4 for conv3_1, got .1, 48"),
        ({"out": "out.txt"}, "out.txt must end in .png, .jpg or another"),
        ({"out": "new/out.xbm"}, "out.xbm must end in .png, .jpg or another"),
        ({"out": "folder.png"}, "Is a directory.*folder.png|Permission denied.*folder.png"),
        ({"out": "text.png/out.png"}, "File exists|Not a directory"),
        ({"arguments": ["--init", "none.png"]}, "No such file"),
        ({"arguments": ["--weights", "none.pth"]}, "No such file"),
        ({"arguments": ["--style-layers", "pool1=1"]}, "style_layers must be weights of some of conv1_1"),
    ],
)
def test_command_says_what_is_wrong(folder, capsys, options, message):
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "content.png").read_bytes()[:400])
    write_picture(torch.rand(3, 1, 1), folder / "dot.png")
    write_picture(torch.rand(3, 2, 900), folder / "line.png")
    (folder / "folder.png").mkdir()
    image = pytest.importorskip("PIL.Image")
    image.new("F", (40, 40), 0.5).save(folder / "float.tif")
    image.new("I", (40, 40), 1000).save(folder / "int.tif")
    assert style_command(folder, *options.pop("arguments", []), **options) == 2
    err = capsys.readouterr().err
    assert re.search(f"pyzoo: .*({message})", err)
    assert "1/2" not in err  # it does not find out in the end
    assert not (folder / "out.png").exists()
    assert not (folder / "new").exists()
