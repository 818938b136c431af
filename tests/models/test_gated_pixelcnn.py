"""Gated PixelCNN: what each output sees, the numbers of weights, likelihoods, conditions, samples, bad input."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from pyzoo.models.gated_pixelcnn import (
    Deconvolution,
    GatedPixelCNN,
    PixelCNN,
    PixelCNNAutoEncoder,
    bits_per_dim,
)
from pyzoo.nn import MaskedConv2d
from pyzoo.ops import pixelcnn_logits_reference
from pyzoo.ops.masked_conv2d import live_weights


def make(kind=GatedPixelCNN, channels=1, levels=4, *, dtype=torch.float64, seed=0, **options):
    """A small model. Weights are enlarged, so that what reaches an output does not vanish on the way."""
    torch.manual_seed(seed)
    options = {"width": 6, "layers": 2, "kernel": 3, "head": 6, **options}
    model = kind(channels=channels, levels=levels, **options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    return model


def random_image(model, images=2, height=5, width=6):
    return torch.randint(model.levels, (images, model.channels, height, width))


def masks(model):
    """Each masked convolution and which of its weights count."""
    for m in model.modules():
        if isinstance(m, MaskedConv2d):
            order = {"colors": m.colors, "gates": m.gates}
            yield m, live_weights(m.out_channels, m.in_channels, m.kernel_size, m.mask, **order)


# ------------------------------------------------------------------------------------------------- what an output sees


def seen(model, size, c, i, j):
    """bool [C, H, W]: the values that the logits of color c at (i, j) have a derivative in, for one image of ten, as
    those units of the head may all be zero."""
    image = torch.randn(10, model.channels, *size, dtype=torch.float64, requires_grad=True)
    logits = model.logits(image)[:, c, :, i, j]
    (grad,) = torch.autograd.grad((logits * torch.randn_like(logits)).sum(), image)
    return (grad != 0).any(0)


def before(channels, size, c, i, j, rows, left, right):
    """bool [C, H, W]: what comes before color c at (i, j), of so many rows above and columns beside."""
    color, y, x = torch.meshgrid(*(torch.arange(n) for n in (channels, *size)), indexing="ij")
    above = (y < i) & (y >= i - rows) & (x >= j - left) & (x <= j + right)
    beside = (y == i) & (x < j) & (x >= j - left)
    return above | beside | ((y == i) & (x == j) & (color < c))


@pytest.mark.parametrize(("channels", "layers", "kernel", "first_kernel"), [(1, 3, 3, 7), (3, 2, 3, 7), (3, 1, 5, 3)])
@pytest.mark.parametrize("gated", [True, False])
def test_sees_all_before_and_nothing_else(channels, layers, kernel, first_kernel, gated):
    """The Jacobian is non-zero where the sheet of the architecture says, exactly: no blind spot, no leak."""
    options = {"layers": layers, "kernel": kernel, "first_kernel": first_kernel, "gated": gated}
    model = make(channels=channels, width=24, head=24, **options)
    side = first_kernel // 2 + layers * (kernel // 2)
    size = (side + 2, 2 * side + 2)
    columns = (0, side, size[1] - 1)
    for c, i, j in product(range(channels), (0, 1, size[0] - 1), columns):
        assert torch.equal(seen(model, size, c, i, j), before(channels, size, c, i, j, side + 1, side, side))


@pytest.mark.parametrize(("layers", "missing", "window"), [(3, 6, 84), (7, 28, 220)])
def test_blind_spot_of_a_single_stack(layers, missing, window):
    model = make(PixelCNN, width=12, head=24, layers=layers)
    side = 3 + layers
    size, c, i, j = (side + 1, 2 * side + 1), 0, side, side
    expected, sees = before(1, size, c, i, j, side, side, side), seen(model, size, c, i, j)
    assert not (sees & ~expected).any()
    assert (int(expected.sum()), int((expected & ~sees).sum())) == (window, missing)
    assert not sees[0, i - 1, j + 4 :].any()
    assert sees[0, i - 1, : j + 4].all()


@pytest.mark.parametrize("make_model", [make, lambda **options: make(PixelCNN, **options)], ids=["gated", "single"])
@pytest.mark.parametrize("channels", [1, 3])
def test_later_values_change_no_bit(make_model, channels):
    model = make_model(channels=channels, dtype=torch.float32)
    x = random_image(model, 1, 6, 7)
    logits = model(x)
    order = torch.arange(channels * 42).view(6, 7, channels).permute(2, 0, 1).contiguous()  # [C, H, W]: when
    for t in range(0, channels * 42, 5):
        changed = torch.where(order == t, (x + 1) % model.levels, x)
        up_to = (order <= t)[None, :, None].expand_as(logits)
        after = model(changed)
        assert torch.equal(after[up_to], logits[up_to])
        assert t + channels >= channels * 42 or not torch.equal(after, logits)


# -------------------------------------------------------------------------------------------------- weights and numbers


@pytest.mark.parametrize(
    ("channels", "levels", "options", "stored", "masked"),
    [
        (1, 2, {"width": 16, "layers": 7, "kernel": 3, "head": 32}, 41_442, 32),
        (3, 256, {"width": 24, "layers": 3, "kernel": 3, "head": 48}, 83_280, 14_688),
        (3, 256, {}, 122_961_663, 3_392_640),
    ],
)
def test_number_of_weights(channels, levels, options, stored, masked):
    """Stored: where kernels are rectangles around what they see, of which colors then mask some."""
    with torch.device("meta"):
        model = GatedPixelCNN(channels, levels, **options)
    count = sum(p.numel() for p in model.parameters()) - sum(int((~live).sum()) for _, live in masks(model))
    assert count == stored - masked
    rectangles = 0
    for layer in model.layers:
        weights = layer.weights()
        rectangles += sum(t.numel() for name, t in vars(weights).items() if name != "residual")
    rectangles += sum(p.numel() for p in model.head.parameters())
    assert rectangles == stored


@pytest.mark.parametrize("kind", [GatedPixelCNN, PixelCNN])
def test_masked_weights_take_no_part(kind):
    """They may hold anything and get no gradient."""
    model = make(kind, channels=3)
    x, uniforms = random_image(model), torch.rand(2, 3, 5, 6, dtype=torch.float64)
    logits, samples = model(x), model.sample((2, 5, 6), uniforms=uniforms)
    with torch.no_grad():
        for conv, live in masks(model):
            conv.weight[~live] = torch.nan
    assert torch.equal(model(x), logits)
    assert torch.equal(model.sample((2, 5, 6), uniforms=uniforms), samples)
    bits_per_dim(model(x), x).backward()
    for conv, live in masks(model):
        assert conv.weight.grad.isfinite().all()
        assert not conv.weight.grad[~live].any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("condition", [0, 5])
def test_equal_to_the_sampler_specification(channels, condition):
    """Which applies masks to weights and uses PyTorch's convolutions."""
    model = make(channels=channels, condition=condition)
    x = random_image(model)
    h = torch.randn(2, condition, dtype=torch.float64) if condition else None
    terms = None
    if condition:
        s = h[..., None, None]
        terms = [
            (layer.vertical_condition(s).flatten(1), layer.horizontal_condition(s).flatten(1)) for layer in model.layers
        ]
    expected = pixelcnn_logits_reference(model.network(), x, terms)
    torch.testing.assert_close(model(x, h), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "h"), [(GatedPixelCNN, None), (GatedPixelCNN, 2), (PixelCNN, None)])
def test_probabilities_of_all_images_add_up(kind, h):
    """The 512 images of 3 x 3 pixels that are black or white."""
    model = make(kind, levels=2, **({} if h is None else {"condition": 3}))
    x = (torch.arange(512)[:, None] >> torch.arange(9) & 1).view(512, 1, 3, 3)
    with torch.no_grad():
        logits = model(x, None if h is None else torch.full((512,), h))
    nats = F.cross_entropy(logits[:, 0], x[:, 0], reduction="none").sum((1, 2))
    assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-12)
    assert nats.std() > 0.1  # it is not that all are equally likely


def test_bits_per_dim():
    model = make(channels=3, levels=8)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
    x = random_image(model)
    assert bits_per_dim(model(x), x).item() == pytest.approx(3)
    assert bits_per_dim(model(x), x.to(torch.uint8)).item() == pytest.approx(3)
    logits = torch.randn(2, 3, 8, 5, 6)
    picked = logits.log_softmax(2).gather(2, x[:, :, None])
    assert bits_per_dim(logits, x).item() == pytest.approx(-picked.mean().item() / math.log(2), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- conditions


def test_classes_are_one_hot_vectors():
    model = make(condition=5)
    x, labels = random_image(model, 3), torch.tensor([4, 0, 2])
    expected = model(x, F.one_hot(labels, 5).double())
    assert torch.equal(model(x, labels), expected)
    assert torch.equal(model(x, labels.int()), expected)
    assert not torch.equal(model(x, labels.flip(0)), expected)


def test_condition_is_equation_4():
    """It is added to what each gate gets, the same everywhere; with zero matrices there is none."""
    model, plain = make(condition=5), make()
    x, h = random_image(model), torch.randn(2, 5, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "condition" not in k})
    with torch.no_grad():
        for layer in plain.layers:  # of an image alone, it is a bias
            other = model.layers[list(plain.layers).index(layer)]
            layer.vertical.bias += other.vertical_condition.weight.flatten(1) @ h[0]
            layer.horizontal.bias += other.horizontal_condition.weight.flatten(1) @ h[0]
    torch.testing.assert_close(model(x[:1], h[:1]), plain(x[:1]), rtol=1e-12, atol=1e-12)


def test_location_makes_a_difference_from_place_to_place():
    """Equation 5. The map is added as it is: each output still sees no pixel after it, but may see all of h."""
    model = make(condition=3, location=(5, 6))
    x, h = random_image(model), torch.randn(2, 3, dtype=torch.float64)
    s = model.location(h)
    assert s.shape == (2, 6, 5, 6)
    assert s.std((2, 3)).min() > 0
    terms = [(layer.vertical_condition(s), layer.horizontal_condition(s)) for layer in model.layers]
    expected = pixelcnn_logits_reference(model.network(), x, terms)
    torch.testing.assert_close(model(x, h), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (28, 20), (5, 6), (7, 64), (1, 1)])
def test_deconvolution_has_the_size_of_the_image(size):
    net = Deconvolution(3, 4, size)
    assert net(torch.randn(2, 3)).shape == (2, 4, *size)
    transposed = [m for m in net if isinstance(m, torch.nn.ConvTranspose2d)]
    assert len(transposed) == {(16, 16): 2, (8, 8): 1, (28, 20): 2}.get(size, 0)


def test_autoencoder_learns_through_h():
    """Its decoder gets h of the encoder; the gradient of the likelihood reaches the encoder."""
    torch.manual_seed(0)
    options = {"channels": 1, "levels": 4, "width": 6, "layers": 2, "kernel": 3, "head": 6}
    model = PixelCNNAutoEncoder(3, (8, 10), maps=(4, 5, 6), **options)
    x = random_image(model.decoder, 3, 8, 10)
    logits = model(x)
    assert model.encode(x).shape == (3, 3)
    assert torch.equal(logits, model.decoder(x, model.encode(x)))
    bits_per_dim(logits, x).backward()
    assert all(p.grad.abs().max() > 0 for p in model.encoder.parameters())
    samples = [model.reconstruct(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


# -------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(("options", "h"), [
    ({}, None),
    ({"condition": 5}, "classes"),
    ({"condition": 5}, "vectors"),
    ({"condition": 5, "location": (4, 5)}, "classes"),
])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_cached_samples_are_those_of_full_passes(channels, options, h):
    model = make(channels=channels, **options)
    h = {None: None, "classes": torch.tensor([4, 0, 1]), "vectors": torch.randn(3, 5, dtype=torch.float64)}[h]
    uniforms = torch.rand(3, channels, 4, 5, dtype=torch.float64)
    image, known = random_image(model, 3, 4, 5), torch.rand(3, 1, 4, 5) < 0.5
    for given in ({}, {"image": image, "known": known}, {"temperature": 0.5}):
        cached = model.sample((3, 4, 5), h, uniforms=uniforms, **given)
        assert torch.equal(cached, model.sample((3, 4, 5), h, uniforms=uniforms, cached=False, **given))
        if "known" in given:
            assert torch.equal(cached[known.expand_as(cached)], image[known.expand_as(cached)])

    def seeded(cached):
        return model.sample((3, 4, 5), h, generator=torch.Generator().manual_seed(1), cached=cached)

    assert torch.equal(seeded(True), seeded(False))


@pytest.mark.parametrize("options", [{}, {"condition": 5}, {"condition": 5, "location": (5, 6)}])
def test_compiles(options):
    model = make(channels=3, **options)
    x, h = random_image(model), torch.tensor([4, 0]) if options else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, h), model(x, h), rtol=1e-12, atol=1e-12)


def test_sampling_follows_the_probabilities():
    """8000 images of 2 x 2 pixels that are black or white, against the 16 probabilities."""
    for model in (make(levels=2), make(levels=2, gated=False), make(PixelCNN, levels=2)):
        x = (torch.arange(16)[:, None] >> torch.arange(4) & 1).view(16, 1, 2, 2)
        with torch.no_grad():
            p = torch.exp(-F.cross_entropy(model(x)[:, 0], x[:, 0], reduction="none").sum((1, 2)))
        samples = model.sample((8000, 2, 2), generator=torch.Generator().manual_seed(0))
        counts = (samples.flatten(1) << torch.arange(4)).sum(1).bincount(minlength=16)
        assert ((counts - 8000 * p).abs() < 5 * (8000 * p * (1 - p)).sqrt() + 1).all()


def test_completion_repeats_what_it_memorised():
    """Trained on two images, the lower half follows from the upper one."""
    torch.manual_seed(0)
    model = make(dtype=torch.float32, width=12)
    x = random_image(model, 2, 6, 6)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        bits_per_dim(model(x), x).backward()
        optimizer.step()
    hole = torch.ones(6, 6, dtype=torch.bool)
    hole[3:5, 1:5] = False
    for known in (torch.arange(6)[:, None] < 3, hole):
        completed = model.sample((2, 6, 6), image=x, known=known, temperature=0.1)
        assert (completed == x).float().mean() > 0.95


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 4), TypeError, "x must be a tensor of integers, the levels, got torch.float32"),
        (torch.zeros(2, 3, 4, 4).bool(), TypeError, "x must be a tensor of integers.*torch.bool"),
        ([[0]], TypeError, "x must be a tensor of integers.*list"),
        (torch.zeros(2, 1, 4, 4).long(), ValueError, r"x must have shape \[N, 3, H, W\], got \[2, 1, 4, 4\]"),
        (torch.zeros(3, 4, 4).long(), ValueError, r"x must have shape \[N, 3, H, W\], got \[3, 4, 4\]"),
        (torch.full((2, 3, 4, 4), 4), ValueError, r"x must be in \[0, 4\), got 4"),
        (torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), ValueError, r"x must be in \[0, 4\), got 255"),
        (torch.full((2, 3, 4, 4), -1), ValueError, r"x must be in \[0, 4\), got -1"),
    ],
)
@pytest.mark.parametrize("kind", [GatedPixelCNN, PixelCNN])
def test_refuses_bad_images(kind, x, error, message):
    with pytest.raises(error, match=f"^{kind.__name__}: {message}"):
        make(kind, channels=3)(x)


@pytest.mark.parametrize(
    ("h", "error", "message"),
    [
        (None, TypeError, "h must be a tensor of floats, or of integers, classes, got NoneType"),
        ([1, 2], TypeError, "h must be a tensor of floats.*got list"),
        (torch.tensor([True, False]), TypeError, "h must be a tensor of floats.*got torch.bool"),
        (torch.tensor([0, 5]), ValueError, r"h must be classes in \[0, 5\), got 5"),
        (torch.tensor([0, -1]), ValueError, r"h must be classes in \[0, 5\), got -1"),
        (torch.tensor([0, 1, 2]), ValueError, r"h must have shape \[2\] if of torch.int64, got \[3\]"),
        (torch.zeros(2, 5).long(), ValueError, r"h must have shape \[2\] if of torch.int64, got \[2, 5\]"),
        (torch.zeros(2, 4), ValueError, r"h must have shape \[2, 5\] if of torch.float32, got \[2, 4\]"),
        (torch.zeros(1, 5), ValueError, r"h must have shape \[2, 5\] if of torch.float32, got \[1, 5\]"),
        (torch.zeros(2), ValueError, r"h must have shape \[2, 5\] if of torch.float32, got \[2\]"),
    ],
)
def test_refuses_bad_conditions(h, error, message):
    model = make(condition=5)
    with pytest.raises(error, match=f"^GatedPixelCNN: {message}"):
        model(random_image(model), h)
    for cached in (True, False):
        with pytest.raises(error, match=f"^GatedPixelCNN: {message}"):
            model.sample((2, 5, 6), h, cached=cached)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make()(random_image(make()), torch.zeros(2, 5)), "h must be None, as the model has no condition"),
        (lambda: make(location=(4, 4)), "location needs a condition"),
        (lambda: make(levels=1), "channels must be at least 1 and levels 2, got 1 and 1"),
        (lambda: make(channels=3, width=8), "colors must divide the channels"),
        (lambda: make(kernel=4), "odd height and width"),
        (
            lambda: make(condition=2, location=(4, 4)).sample((2, 5, 4), torch.zeros(2, 2)),
            r"images must be \[4, 4\], as location, got \[5, 4\]",
        ),
        (
            lambda: PixelCNNAutoEncoder(2, (8, 8), channels=1, width=4, head=4)(torch.zeros(1, 1, 8, 9).int()),
            r"images must be \[8, 8\], got \[8, 9\]",
        ),
        (lambda: PixelCNNAutoEncoder(2, (8, 3)), r"size must be at least 4 x 4 and bottleneck 1, got \[8, 3\] and 2"),
        (lambda: PixelCNNAutoEncoder(0), r"got \[32, 32\] and 0"),
        (
            lambda: make(PixelCNN).sample((1, 2, 2), known=torch.tensor(True)),
            "PixelCNN: image and known go together, got only known",
        ),
        (
            lambda: make(PixelCNN).sample((1, 2, 2), image=torch.full((1, 1, 2, 2), 4), known=torch.tensor(True)),
            r"PixelCNN: image must be in \[0, 4\) where known, got 4",
        ),
        (
            lambda: make().sample((1, 2, 2), image=torch.full((1, 1, 2, 2), 4), known=torch.tensor(True)),
            r"image must be in \[0, 4\) where known, got 4",
        ),
        *[
            (lambda kind=kind, options=options: make(kind).sample((1, 2, 2), **options), message)
            for kind in (GatedPixelCNN, PixelCNN)
            for options, message in (
                ({"temperature": 0}, "temperature must be positive and finite, got 0"),
                ({"temperature": -1.0}, "temperature must be positive and finite, got -1"),
                ({"uniforms": torch.zeros(1, 1, 2, 3)}, r"uniforms must have shape \[1, 1, 2, 2\]"),
                (
                    {"image": torch.zeros(1, 1, 2, 2).int(), "known": torch.ones(3, 3).bool()},
                    r"known must expand to shape \[1, 1, 2, 2\], got \[3, 3\]",
                ),
            )
        ],
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
