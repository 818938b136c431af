"""What makes the masked convolution autoregressive, and MaskedConv2d an nn.Conv2d."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pyzoo.nn import MaskedConv2d
from pyzoo.ops import masked_conv2d
from tests.specs.masked_conv2d import MASKS, float_mask

CASES = [
    (mask, kernel, colors)
    for mask, kernel, colors in itertools.product(MASKS, ((1, 1), (3, 3), (5, 3), (1, 5), (7, 1)), (1, 3))
    if colors == 1 or not mask.startswith("vertical")
]


def positive(module: nn.Module) -> nn.Module:
    """With positive weights no two influences cancel. NaN where the mask is: it must not matter."""
    for conv in module.modules():
        if isinstance(conv, MaskedConv2d):
            live = float_mask(conv.out_channels, conv.in_channels, conv.kernel_size, conv.mask, conv.colors, conv.gates)
            conv.weight.data = torch.where(live > 0, torch.rand(live.shape) + 0.5, torch.nan).double()
            conv.bias.data = conv.bias.data.double()
    return module


def influence(f, channels, height, width):
    """bool [out channels, y, x, in channels, y, x]: which inputs change which outputs."""
    x = torch.rand(1, channels, height, width, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: f(x)[0])(x)[..., 0, :, :, :]
    assert jacobian.isfinite().all()
    return jacobian != 0


def offsets(height, width):
    """dy, dx of every input pixel from every output pixel: [y, x, y, x]."""
    y, x = torch.arange(height), torch.arange(width)
    shape = (height, width, height, width)
    dy = (y[None, None, :, None] - y[:, None, None, None]).expand(shape)
    return dy, (x - x[:, None, None]).expand(shape)


def own_pixel(dy, dx, colors, strict):
    """[out color, y, x, in color, y, x] on the pixel itself."""
    order = torch.arange(colors)
    seen = order < order[:, None] if strict else order <= order[:, None]
    return seen[:, None, None, :, None, None] & ((dy == 0) & (dx == 0))[None, :, :, None]


@pytest.mark.parametrize(("mask", "kernel", "colors"), CASES)
def test_one_layer_sees_what_its_mask_says(mask, kernel, colors):
    height, width = 6, 7
    conv = positive(MaskedConv2d(2 * colors, 4 * colors, kernel, mask=mask, colors=colors, gates=2))
    dy, dx = offsets(height, width)
    near = (dy.abs() <= kernel[0] // 2) & (dx.abs() <= kernel[1] // 2)
    above, left = near & (dy < 0), near & (dy == 0) & (dx < 0)
    rows = {"vertical_a": above, "vertical_b": near & (dy <= 0)}.get(mask)
    if rows is None:
        before = left if mask.startswith("horizontal") else above | left
        expected = before[None, :, :, None] | own_pixel(dy, dx, colors, strict=mask[-1] in "Aa")
    else:
        expected = rows[None, :, :, None]
    actual = influence(conv, 2 * colors, height, width)
    expected = expected.expand(colors, height, width, colors, height, width)
    for gate in actual.unflatten(0, (2, colors, 2)):
        for out, channel in itertools.product(range(2), repeat=2):
            assert torch.equal(gate[:, out].unflatten(3, (colors, 2))[:, :, :, :, channel], expected)


def in_order(dy, dx, colors):
    """What an autoregressive model may see: earlier pixels, and earlier colors of the same one."""
    return ((dy < 0) | ((dy == 0) & (dx < 0)))[None, :, :, None] | own_pixel(dy, dx, colors, strict=True)


@pytest.mark.parametrize("colors", [1, 3])
def test_single_stack_is_causal_and_has_a_blind_spot(colors):
    layers, side, p = 3, 13, 4 * colors
    stack = nn.Sequential(
        MaskedConv2d(colors, p, 7, mask="A", colors=colors),
        *(MaskedConv2d(p, p, 3, mask="B", colors=colors) for _ in range(layers)),
        MaskedConv2d(p, colors, 1, mask="B", colors=colors),
    )
    seen = influence(positive(stack), colors, side, side)
    dy, dx = offsets(side, side)
    allowed = in_order(dy, dx, colors)
    assert not (seen & ~allowed).any()
    reach = 3 + layers
    window = allowed & ((dy >= -reach) & (dx.abs() <= reach))[None, :, :, None]
    y, x, color = reach, reach, colors - 1
    missing = window[color, y, x, 0] & ~seen[color, y, x, 0]
    missing[y, x] = False
    assert int(missing.sum()) == 6  # of 84: the blind spot, right above


class TwoStacks(nn.Module):
    """The vertical and the horizontal stack of the Gated PixelCNN, without its gates."""

    def __init__(self, colors, p, layers):
        super().__init__()
        sizes = [(colors, 7), *[(p, 3)] * layers]
        kind = ["a", *["b"] * layers]
        self.v = nn.ModuleList(
            MaskedConv2d(c, p, size, mask=f"vertical_{k}") for (c, size), k in zip(sizes, kind, strict=True)
        )
        self.h = nn.ModuleList(
            MaskedConv2d(c, p, (1, size), mask=f"horizontal_{k}", colors=colors)
            for (c, size), k in zip(sizes, kind, strict=True)
        )
        self.out = MaskedConv2d(p, colors, 1, mask="B", colors=colors)

    def forward(self, x):
        v = h = x
        for vertical, horizontal in zip(self.v, self.h, strict=True):
            v = vertical(v)
            h = horizontal(h) + v
        return self.out(h)


@pytest.mark.parametrize("colors", [1, 3])
def test_two_stacks_see_every_allowed_pixel(colors):
    layers, side = 2, 11
    seen = influence(positive(TwoStacks(colors, 2 * colors, layers)), colors, side, side)
    dy, dx = offsets(side, side)
    reach = 3 + layers
    window = in_order(dy, dx, colors) & ((dy >= -reach) & (dx.abs() <= reach))[None, :, :, None]
    assert torch.equal(seen, window)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_later_pixels_do_not_change_a_bit(layout):
    torch.manual_seed(0)
    stack = nn.Sequential(MaskedConv2d(3, 48, 5, mask="A", colors=3), MaskedConv2d(48, 33, 3, mask="B", colors=3))
    x = torch.randn(2, 3, 9, 17).contiguous(memory_format=layout)
    with torch.no_grad():
        before = stack(x)
        x[:, :, 4, 8:] = x[:, :, 5:] = torch.nan
        after = stack(x)
    assert torch.equal(after[:, :, :4], before[:, :, :4])
    assert torch.equal(after[:, :, 4, :8], before[:, :, 4, :8])
    assert torch.equal(after[:, :11, 4, 8], before[:, :11, 4, 8])  # the first color of the pixel itself


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [5, 40])
def test_bits_do_not_depend_on_the_place(channels, layout):
    """Samplers that compute one pixel at a time give what the whole map gives."""
    x = torch.randn(3, channels, 12, 31).contiguous(memory_format=layout)
    conv = MaskedConv2d(channels, 70, 3, mask="B").requires_grad_(False)
    whole = conv(x)
    assert torch.equal(conv(x[1:2, :, 3:7, 5:9])[:, :, 1:, 1:-1], whole[1:2, :, 4:7, 6:8])
    row = MaskedConv2d(channels, 70, (1, 5), mask="horizontal_a").requires_grad_(False)
    assert torch.equal(row(x[..., 6:7, :9])[..., -1], row(x)[:, :, 6:7, 8])


@pytest.mark.parametrize("junk", [1e6, torch.nan])
@pytest.mark.parametrize(("mask", "kernel", "colors"), CASES)
def test_masked_weights_are_not_there(mask, kernel, colors, junk):
    x = torch.randn(2, 6, 5, 6, requires_grad=True)
    live = float_mask(12, 6, kernel, mask, colors, 2) > 0
    weight = torch.randn(live.shape)
    results = []
    for hidden in (0.0, junk):
        leaf = torch.where(live, weight, hidden).requires_grad_()
        y = masked_conv2d(x, leaf, mask=mask, colors=colors, gates=2)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, leaf))))
        assert not results[-1][2][~live].any()
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_module_is_a_conv2d():
    masked = MaskedConv2d(6, 12, (3, 5), mask="B", colors=3, gates=2, dilation=(2, 1))
    assert isinstance(masked, nn.Conv2d)
    plain = nn.Conv2d(6, 12, (3, 5), padding="same", dilation=(2, 1))
    live = float_mask(12, 6, (3, 5), "B", 3, 2)
    x = torch.randn(2, 6, 7, 8)
    plain.load_state_dict(masked.state_dict())
    plain.weight.data *= live
    torch.testing.assert_close(plain(x), masked(x), rtol=1e-4, atol=1e-5)
    plain.weight.data[live == 0] = torch.nan
    masked.load_state_dict(plain.state_dict())
    assert masked(x).isfinite().all()
    assert MaskedConv2d(4, 4, 3, mask="vertical").mask == "vertical_b"
    assert MaskedConv2d(4, 4, 3, mask="horizontal", bias=False).bias is None
    assert "mask='B', colors=3, gates=2" in repr(masked)


def test_module_checks_when_it_is_made():
    with pytest.raises(ValueError, match="MaskedConv2d: the kernel must have odd height and width, got 2 x 2"):
        MaskedConv2d(3, 6, 2, mask="A")
    with pytest.raises(ValueError, match="MaskedConv2d: colors must divide"):
        MaskedConv2d(4, 6, 3, mask="A", colors=3)
    with pytest.raises(ValueError, match="MaskedConv2d: mask must be one of"):
        MaskedConv2d(3, 6, 3, mask="left")


def test_a_step_of_training_leaves_masked_weights_alone():
    conv = MaskedConv2d(3, 6, 3, mask="A", colors=3)
    live = float_mask(6, 3, (3, 3), "A", 3)
    before = conv.weight.detach().clone()
    optimizer = torch.optim.Adam(conv.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        conv(torch.randn(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
    assert torch.equal(conv.weight[live == 0], before[live == 0])
    assert (conv.weight[live == 1] != before[live == 1]).all()
