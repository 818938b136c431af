"""The cached PixelCNN sampler: it draws what the loop of full forwards draws, and that loop draws from p(x)."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

import pyzoo
from pyzoo.ops import (
    PixelCNNLayer,
    PixelCNNNetwork,
    pixelcnn_logits_reference,
    pixelcnn_sample,
    pixelcnn_sample_reference,
)
from pyzoo.ops.pixelcnn_sample import _UNKNOWN, _addends, _color_mask, _flat
from tests.specs import inputs
from tests.specs.pixelcnn_sample import errors, network_errors, random_network, random_uniforms

ISAS = pytest.importorskip("pyzoo._C").build_info()["isas"]
LOGITS = {torch.float64: 1e-12, torch.float32: 1e-5}  # in units of the largest logit
CDF = 1e-5  # float32: how far a uniform may lie outside the step of the reference's cdf that its value belongs to


def random_condition(network, images, height, width, kinds, seed=1):
    """One pair a layer; ``kinds``: for the vertical and the horizontal gate "vector", "map" or None."""
    generator = inputs.generator(seed)
    shape = {"vector": (), "map": (height, width)}

    def term(layer, kind):
        channels = layer.vertical_weight.shape[0]
        return kind and torch.randn(images, channels, *shape[kind], generator=generator, dtype=torch.float64)

    return [tuple(term(layer, kind) for kind in kinds) for layer in network.layers]


def check_logits(actual, expected):
    assert actual.dtype == expected.dtype
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert error <= LOGITS[actual.dtype] * max(1.0, expected.abs().max().item() if actual.numel() else 0.0)


def check_equal_to_naive(network, size, condition=None, **kwargs):
    """float64: the same samples; and the logits of one full forward on them."""
    samples, logits = pixelcnn_sample(network, size, condition, return_logits=True, **kwargs)
    naive, naive_logits = pixelcnn_sample_reference(network, size, condition, return_logits=True, **kwargs)
    assert torch.equal(samples, naive)
    check_logits(logits, naive_logits)
    return samples


def check_drawn_from_reference(network, size, uniforms, condition=None):
    """float32: the value of each pixel is the one that the reference, given the pixels before it, draws."""
    samples, logits = pixelcnn_sample(network, size, condition, uniforms=uniforms, return_logits=True)
    expected = pixelcnn_logits_reference(network, samples, condition)
    check_logits(logits, expected)
    cdf = expected.double().softmax(2).cumsum(2)
    cdf = torch.cat([torch.zeros_like(cdf[:, :, :1]), cdf], 2)
    below, up_to = (cdf.gather(2, samples[:, :, None] + step)[:, :, 0] for step in (0, 1))
    assert (uniforms >= below - CDF).all()
    assert (uniforms <= up_to + CDF).all()


# --------------------------------------------------------------------------------------------------- cached and naive


@pytest.mark.parametrize(("first_kernel", "kernel"), [(3, 3), (5, 3), (7, 5), (3, 7)])
@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 4), (1, 256), (2, 3), (3, 2), (3, 4), (3, 256)])
def test_cached_samples_are_the_naive_ones(channels, levels, first_kernel, kernel):
    network = random_network(channels, levels, 2 * 3 * channels, 2, first_kernel, kernel, 5 * channels)
    sizes = ((1, 1), (1, 9), (9, 1), (3, 3), (5, 4))
    for images, (height, width) in enumerate(sizes, start=1):
        uniforms = random_uniforms(images, network, height, width)
        check_equal_to_naive(network, (images, height, width), uniforms=uniforms)


@pytest.mark.parametrize("seed", range(12))
def test_cached_samples_are_the_naive_ones_for_many_networks(seed):
    channels, levels, layers, images = torch.randint(1, 5, (4,), generator=inputs.generator(seed)).tolist()
    network = random_network(channels, levels + 1, 3 * channels, layers, 3, 3, 2 * channels, seed=seed)
    check_equal_to_naive(network, (images, 4, 5), uniforms=random_uniforms(images, network, 4, 5, seed))


@pytest.mark.parametrize("channels", [1, 3])
def test_8x8_images(channels):
    network = random_network(channels, 4, 12, 3, 7, 3, 12)
    samples = check_equal_to_naive(network, (4, 8, 8), uniforms=random_uniforms(4, network, 8, 8))
    assert samples.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kinds", list(product(("vector", "map", None), repeat=2)), ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_condition(channels, kinds):
    network = random_network(channels, 4, 6, 2)
    condition = random_condition(network, 3, 4, 5, kinds)
    uniforms = random_uniforms(3, network, 4, 5)
    samples = check_equal_to_naive(network, (3, 4, 5), condition, uniforms=uniforms)
    if any(kinds):
        assert not torch.equal(samples, pixelcnn_sample(network, (3, 4, 5), uniforms=uniforms))


def test_known_pixels_are_kept_and_seen():
    network = random_network(3, 4, 6, 2)
    uniforms, generator = random_uniforms(3, network, 6, 5), inputs.generator()
    image = torch.randint(4, (3, 3, 6, 5), generator=generator)
    upper = torch.arange(6)[:, None] < 3
    scattered = torch.rand(3, 3, 6, 5, generator=generator) < 0.5
    for known in (upper, scattered, scattered[:, :1], torch.zeros_like(upper), torch.ones_like(upper)):
        # What stands where nothing is known does not matter, not even that it is no level.
        given = torch.where(known, image, torch.randint(-9, 9, image.shape, generator=generator))
        samples = check_equal_to_naive(network, (3, 6, 5), uniforms=uniforms, image=given, known=known)
        assert torch.equal(samples[known.expand_as(image)], image[known.expand_as(image)])
    free = pixelcnn_sample(network, (3, 6, 5), uniforms=uniforms)
    given = pixelcnn_sample(network, (3, 6, 5), uniforms=uniforms, image=free.int(), known=upper)
    assert torch.equal(free, given)


def test_temperature():
    network = random_network(1, 8, 6, 2)
    uniforms = random_uniforms(4, network, 4, 5)
    for temperature in (0.5, 1.0, 3.0):
        check_equal_to_naive(network, (4, 4, 5), uniforms=uniforms, temperature=temperature)
    coldest, logits = pixelcnn_sample(network, (4, 4, 5), uniforms=uniforms, temperature=1e-9, return_logits=True)
    assert torch.equal(coldest, logits.argmax(2))


def test_uniforms_at_both_ends():
    network = random_network(1, 5, 4, 1)
    for u, level in ((0.0, 0), (1.0, 4)):
        samples = check_equal_to_naive(network, (1, 3, 3), uniforms=torch.full((1, 1, 3, 3), u))
        assert (samples == level).all()


# ----------------------------------------------------------------------------------------- dtypes, processors, threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("channels", "width", "kernel"), [(1, 32, 3), (1, 40, 5), (3, 24, 3), (3, 51, 5)])
def test_lower_precision(channels, width, kernel, dtype):
    network = random_network(channels, 256, width, 4, 7, kernel, width, dtype)
    condition = random_condition(network, 3, 9, 10, ("vector", "map"))
    check_drawn_from_reference(network, (3, 9, 10), random_uniforms(3, network, 9, 10), condition)


def test_mixed_precision_is_computed_in_the_widest():
    network = random_network(dtype=torch.bfloat16)
    assert network.dtype == torch.float32
    bias = network.layers[1].link_bias.double()
    mixed = replace(network, layers=[network.layers[0], replace(network.layers[1], link_bias=bias), network.layers[2]])
    assert mixed.dtype == torch.float64
    check_equal_to_naive(mixed, (2, 3, 4), uniforms=random_uniforms(2, network, 3, 4))


@pytest.mark.parametrize("isa", ISAS)
def test_each_instruction_set(isa, set_isa):
    set_isa(isa)
    for channels, width, images in product((1, 3), (6, 33), (1, 2, 7, 13)):
        network = random_network(channels, 19, width, 2, 5, 3, 12)
        condition = random_condition(network, images, 3, 9, ("map", "vector"))
        uniforms = random_uniforms(images, network, 3, 9)
        check_equal_to_naive(network, (images, 3, 9), condition, uniforms=uniforms)
        single = random_network(channels, 19, width, 2, 5, 3, 12, torch.float32)
        check_drawn_from_reference(single, (images, 3, 9), uniforms, condition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neither_threads_nor_the_batch_change_a_bit(dtype, set_threads):
    network = random_network(3, 16, 24, 3, 7, 3, 24, dtype)
    condition = random_condition(network, 21, 7, 6, ("vector", "map"))
    uniforms = random_uniforms(21, network, 7, 6)

    def draw(images):
        part = [tuple(t[images] for t in pair) for pair in condition]
        size = (len(uniforms[images]), 7, 6)
        return pixelcnn_sample(network, size, part, uniforms=uniforms[images], return_logits=True)

    samples, logits = draw(slice(None))
    for threads in (1, 2, 4):
        set_threads(threads)
        for images in (slice(None), slice(3, 4), slice(5, 10), slice(0, 21, 2)):
            got, got_logits = draw(images)
            assert torch.equal(got, samples[images])
            assert torch.equal(got_logits, logits[images])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gate_is_exact_to_a_few_units(dtype, isa, set_isa):
    """Logits that are gates alone, with the horizontal condition as their argument, over its whole range."""
    set_isa(isa)
    p, zeros = 16, torch.zeros
    identity = torch.eye(p, dtype=dtype)[..., None, None]
    layer = PixelCNNLayer(
        *(zeros(2 * p, 1, 2, 3, dtype=dtype), None, zeros(2 * p, 1, 1, 2), None, zeros(2 * p, 2 * p, 1, 1), None),
        *(identity, None),
        residual=False,
    )
    network = PixelCNNNetwork([layer], [(identity, None)])
    ordinary = torch.randn(4, p, 30, 50, generator=inputs.generator(), dtype=torch.float64)
    scale = torch.logspace(-30, 3, 50, dtype=torch.float64)
    x = (ordinary.abs() * scale).to(dtype)  # positive, as the head begins with a ReLU
    y = (ordinary.flip(1, 2) * 5).to(dtype)
    _, logits = pixelcnn_sample(network, (4, 30, 50), [(None, torch.cat([x, y], 1))], return_logits=True)
    expected = x.double().tanh() * y.double().sigmoid()
    unit = torch.finfo(dtype).eps
    tolerance = 5 if dtype == torch.float32 else 8  # in float64 the expected values are rounded, too
    assert ((logits[:, 0] - expected).abs() <= tolerance * unit * expected).all()


def check_drawn_where_the_first_color_is_known():
    """Although nothing is drawn of the first color, the head of the others reads what it makes of that."""
    for seed in range(3):
        network = random_network(3, 8, 12, 1, seed=seed)
        image = torch.randint(8, (2, 3, 2, 3), generator=inputs.generator(seed))
        known = torch.zeros(2, 3, 2, 3, dtype=torch.bool)
        known[:, 0] = True
        arguments = {"uniforms": random_uniforms(2, network, 2, 3), "image": image, "known": known}
        drawn = pixelcnn_sample(network, (2, 2, 3), **arguments)
        assert torch.equal(drawn, check_equal_to_naive(network, (2, 2, 3), **arguments))


def test_draws_a_color_where_those_before_are_known():
    check_drawn_where_the_first_color_is_known()


# ------------------------------------------------------------------------------------------------- kernels for a GPU


@pytest.mark.parametrize("kinds", [("vector", "map"), ("map", None), (None, "vector")], ids=str)
@pytest.mark.parametrize(("channels", "first_kernel", "kernel"), [(1, 5, 3), (3, 3, 5)])
def test_gpu_kernel_draws_the_same(channels, first_kernel, kernel, kinds, gpu_backend, poison):
    network = random_network(channels, 4, 6 * channels, 1, first_kernel, kernel, 5 * channels)
    condition, uniforms = random_condition(network, 2, 3, 4, kinds), random_uniforms(2, network, 3, 4)
    samples = check_equal_to_naive(network, (2, 3, 4), condition, uniforms=uniforms)
    with pyzoo.backend("cpu"):
        assert torch.equal(samples, pixelcnn_sample(network, (2, 3, 4), condition, uniforms=uniforms))


def test_gpu_kernel_draws_the_same_from_many_levels_and_channels(gpu_backend, poison):
    """More than one block of each."""
    network = random_network(2, 300, 140, 0, 3, 3, 4)
    check_equal_to_naive(network, (1, 1, 2), uniforms=random_uniforms(1, network, 1, 2))
    network = random_network(1, 3, 6, 1)
    check_equal_to_naive(network, (1, 1, 17), uniforms=random_uniforms(1, network, 1, 17))


def test_gpu_kernel_keeps_known_values(gpu_backend, poison):
    network = random_network(3, 4, 6, 1)
    uniforms, generator = random_uniforms(2, network, 3, 3), inputs.generator()
    image = torch.randint(4, (2, 3, 3, 3), generator=generator)
    known = torch.rand(2, 3, 3, 3, generator=generator) < 0.5
    arguments = {"uniforms": uniforms, "image": image, "known": known}
    samples = check_equal_to_naive(network, (2, 3, 3), temperature=0.7, **arguments)
    assert torch.equal(samples[known], image[known])
    assert torch.equal(samples, pixelcnn_sample(network, (2, 3, 3), temperature=0.7, **arguments))  # no logits wanted


def test_gpu_kernel_draws_a_color_where_those_before_are_known(gpu_backend, poison):
    check_drawn_where_the_first_color_is_known()


def test_gpu_kernel_in_lower_precision(gpu_backend, poison):
    for dtype in (torch.float32, torch.bfloat16):
        network = random_network(3, 16, 24, 1, 5, 3, 24, dtype)
        condition = random_condition(network, 2, 2, 3, ("vector", "map"))
        check_drawn_from_reference(network, (2, 2, 3), random_uniforms(2, network, 2, 3), condition)


def test_gpu_kernel_draws_a_level_whatever_the_weights(gpu_backend):
    network = random_network(1, 4, 6, 1)
    for value in (torch.nan, torch.inf, -torch.inf):
        layers = [replace(layer, link_bias=torch.full((12,), value)) for layer in network.layers]
        samples = pixelcnn_sample(PixelCNNNetwork(layers, network.head), (1, 2, 2))
        assert ((samples >= 0) & (samples < 4)).all()
    assert pixelcnn_sample(network, (1, 0, 2)).shape == (1, 1, 0, 2)
    (*head, (weight, bias)) = network.head
    network = PixelCNNNetwork(
        network.layers, [*head, (0 * weight, 0 * bias)]
    )  # all levels alike, u at steps of the cdf
    for u, level in ((0.0, 0), (0.25, 0), (0.5, 1), (1.0, 3)):
        assert (pixelcnn_sample(network, (1, 2, 2), uniforms=torch.full((1, 1, 2, 2), u)) == level).all()


def test_gpu_kernel_does_not_look_at_masked_weights(gpu_backend):
    network, spoiled = random_network(3, 4, 6, 1), spoil(random_network(3, 4, 6, 1))
    uniforms = random_uniforms(1, network, 2, 3)
    expected = pixelcnn_sample(network, (1, 2, 3), uniforms=uniforms)
    assert torch.equal(pixelcnn_sample(spoiled, (1, 2, 3), uniforms=uniforms), expected)


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("conditional", [False, True])
def test_probabilities_of_all_images_sum_to_one(conditional):
    network = random_network(1, 2, 4, 2, 3, 3, 4)
    images = torch.tensor(list(product((0, 1), repeat=9))).view(-1, 1, 3, 3)
    condition = random_condition(network, 1, 3, 3, ("vector", "map")) if conditional else None
    if condition:
        condition = [tuple(t.expand(512, *t.shape[1:]) for t in pair) for pair in condition]
    logits = pixelcnn_logits_reference(network, images, condition)
    likelihood = logits.log_softmax(2).gather(2, images[:, :, None]).sum((1, 2, 3, 4)).exp()
    assert likelihood.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pixel_sees_all_pixels_before_it_and_no_other(channels):
    """The set of van den Oord et al. without a blind spot, from the Jacobian of the logits."""
    first, kernel, layers, size = 5, 3, 2, 11
    network = random_network(channels, 2, 24, layers, first, kernel, 24)
    x = torch.rand(1, channels, size, size, generator=inputs.generator(), dtype=torch.float64)
    i, j = 6, 5
    jacobian = torch.autograd.functional.jacobian(
        lambda x: pixelcnn_logits_reference(network, x)[0, :, :, i, j].sum(1), x
    )
    up, side = (first + 1) // 2 + layers * (kernel // 2), first // 2 + layers * (kernel // 2)
    for c in range(channels):
        expected = torch.zeros(channels, size, size, dtype=torch.bool)
        expected[:, max(i - up, 0) : i, max(j - side, 0) : j + side + 1] = True
        expected[:, i, max(j - side, 0) : j] = True
        expected[:c, i, j] = True
        assert torch.equal(jacobian[c, 0] != 0, expected)


def spoil(network):
    """The network with NaN where weights are masked."""

    def spoiled(weight, own, **mask):
        weight = weight.clone()
        hidden = _color_mask(weight, network.channels, **mask)[..., 0, 0] == 0
        assert hidden.any()
        weight[..., own][hidden] = torch.nan
        return weight

    layers = [
        replace(
            layer,
            horizontal_weight=spoiled(layer.horizontal_weight, (0, -1), halves=2, strict=i == 0),
            output_weight=spoiled(layer.output_weight, (0, 0)),
        )
        for i, layer in enumerate(network.layers)
    ]
    return PixelCNNNetwork(layers, [(spoiled(weight, (0, 0)), bias) for weight, bias in network.head])


def test_masked_weights_are_not_looked_at():
    network = random_network(3, 4, 6, 2)
    uniforms = random_uniforms(2, network, 4, 5)
    expected = pixelcnn_sample(network, (2, 4, 5), uniforms=uniforms)
    assert torch.equal(pixelcnn_sample(spoil(network), (2, 4, 5), uniforms=uniforms), expected)


def test_frequencies_are_the_probabilities():
    network = random_network(1, 3, 4, 1)
    samples = pixelcnn_sample(network, (20000, 1, 2), generator=inputs.generator())
    index = (3 * samples[:, 0, 0, 0] + samples[:, 0, 0, 1]).bincount(minlength=9) / len(samples)
    images = torch.tensor(list(product(range(3), repeat=2))).view(-1, 1, 1, 2)
    logits = pixelcnn_logits_reference(network, images)
    probability = logits.log_softmax(2).gather(2, images[:, :, None]).sum((1, 2, 3, 4)).exp()
    assert (index - probability).abs().max() < 0.02  # five standard deviations


# ----------------------------------------------------------------------------------------------------------- arguments


def test_seeds():
    network = random_network(3, 16, 6, 1)

    def draw(seed):
        return pixelcnn_sample(network, (2, 4, 5), generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    naive = pixelcnn_sample_reference(network, (2, 4, 5), generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(3), naive)
    torch.manual_seed(3)
    assert torch.equal(draw(3), pixelcnn_sample(network, (2, 4, 5)))


@pytest.mark.parametrize("size", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(size):
    network = random_network(3)
    images, height, width = size
    for draw in (pixelcnn_sample, pixelcnn_sample_reference):
        samples, logits = draw(network, size, return_logits=True)
        assert samples.shape == (images, 3, height, width)
        assert logits.shape == (images, 3, 4, height, width)


def test_any_strides_and_no_biases():
    network = random_network(3, 4, 6, 2)
    layers = [
        replace(
            layer,
            vertical_weight=layer.vertical_weight.to(memory_format=torch.channels_last),
            horizontal_weight=layer.horizontal_weight.repeat_interleave(2, 1)[:, ::2],
            link_weight=layer.link_weight.transpose(0, 1).contiguous().transpose(0, 1),
            output_bias=None,
        )
        for layer in network.layers
    ]
    strided = PixelCNNNetwork(layers, [(weight, None) for weight, _ in network.head])
    plain = PixelCNNNetwork(
        [replace(layer, output_bias=torch.zeros(6)) for layer in network.layers],
        [(weight, torch.zeros(len(weight))) for weight, _ in network.head],
    )
    uniforms = random_uniforms(3, network, 4, 5)
    image = torch.randint(4, (3, 3, 4, 5), generator=inputs.generator())
    known = torch.arange(5) < 2
    got = pixelcnn_sample(
        strided,
        (3, 4, 5),
        uniforms=uniforms.mT.contiguous().mT,
        image=image.to(memory_format=torch.channels_last),
        known=known,
    )
    assert got.is_contiguous()
    assert torch.equal(got, pixelcnn_sample(plain, (3, 4, 5), uniforms=uniforms, image=image, known=known))


def test_weights_that_are_not_finite_give_levels():
    network = random_network(1, 4, 6, 2)
    for value in (torch.nan, torch.inf, -torch.inf):
        layers = [replace(layer, link_bias=torch.full((12,), value)) for layer in network.layers]
        samples = pixelcnn_sample(PixelCNNNetwork(layers, network.head), (2, 4, 5))
        assert ((samples >= 0) & (samples < 4)).all()


ERRORS = list(errors())
NETWORK_ERRORS = list(network_errors())


@pytest.mark.parametrize("error", ERRORS, ids=[error.id for error in ERRORS])
def test_errors(error):
    with pytest.raises(error.error, match=error.match):
        pixelcnn_sample(**error.kwargs)
    with pytest.raises(error.error, match=error.match.replace("pixelcnn_sample", "pixelcnn_sample_reference")):
        pixelcnn_sample_reference(**error.kwargs)


@pytest.mark.parametrize(
    ("make", "error", "match"), [e[1:] for e in NETWORK_ERRORS], ids=[e[0] for e in NETWORK_ERRORS]
)
def test_network_errors(make, error, match):
    with pytest.raises(error, match=f"^PixelCNNNetwork: .*{match}"):
        make()


def test_logits_reference_errors():
    network = random_network(3)
    with pytest.raises(ValueError, match=r"x must have shape \[B, 3, H, W\], got \[2, 1, 4, 5\]"):
        pixelcnn_logits_reference(network, torch.zeros(2, 1, 4, 5))
    with pytest.raises(TypeError, match="network must be a PixelCNNNetwork, got int"):
        pixelcnn_logits_reference(3, torch.zeros(2, 1, 4, 5))


# -------------------------------------------------------------------------------------------------------- the operator


def operator_arguments(network, size=(2, 3, 4), return_logits=True):
    condition = random_condition(network, *size, ("vector", "map"))
    addends = _addends("test", network, condition, *size)
    flat = [t for pair in addends for t in pair]
    images, height, width = size
    start = torch.full((images, network.channels, height, width), _UNKNOWN)
    residual = [layer.residual for layer in network.layers]
    uniforms = random_uniforms(images, network, height, width)
    return _flat(network), residual, flat, uniforms, start, 1.0, return_logits


@pytest.mark.parametrize("return_logits", [False, True])
def test_opcheck(return_logits):
    arguments = operator_arguments(random_network(3), return_logits=return_logits)
    torch.library.opcheck(torch.ops.pyzoo.pixelcnn_sample.default, arguments)


def test_bare_operator_refuses_to_lose_a_gradient():
    weights, *rest = operator_arguments(random_network(3))
    weights[0].requires_grad_()
    with pytest.raises(TypeError, match="requires grad"):
        torch.ops.pyzoo.pixelcnn_sample(weights, *rest)


def test_parameters_are_sampled_without_gradient():
    network = random_network(3)
    for layer in network.layers:
        layer.link_weight.requires_grad_()
    uniforms = random_uniforms(2, network, 3, 4)
    _, logits = pixelcnn_sample(network, (2, 3, 4), uniforms=uniforms, return_logits=True)
    assert not logits.requires_grad
    check_equal_to_naive(network, (2, 3, 4), uniforms=uniforms)


def test_compiles():
    network = random_network(3)
    uniforms = random_uniforms(2, network, 3, 4)
    image, known = torch.randint(4, (2, 3, 3, 4)), torch.rand(2, 1, 3, 4) < 0.5

    def draw(uniforms, image, known):
        return pixelcnn_sample(network, (2, 3, 4), uniforms=uniforms, image=image, known=known)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(uniforms, image, known), draw(uniforms, image, known))
    with pytest.raises(ValueError, match=r"image must be in \[0, 4\) where known, got 4"):
        compiled(uniforms, image * 0 + 4, torch.ones_like(known))


def test_meta_tensors_have_the_right_shapes():
    network = random_network(3, 4)
    arguments = [
        [t.to("meta") for t in x] if isinstance(x, list) and isinstance(x[0], torch.Tensor) else x
        for x in operator_arguments(network)
    ]
    arguments[3:5] = (t.to("meta") for t in arguments[3:5])
    samples, logits = torch.ops.pyzoo.pixelcnn_sample(*arguments)
    assert (samples.shape, samples.dtype) == ((2, 3, 3, 4), torch.int64)
    assert (logits.shape, logits.dtype) == ((2, 3, 4, 3, 4), torch.float64)


def test_core_guards_its_memory():
    """What Python has checked before; here as if it had not."""
    samples, uniforms = torch.zeros(1, 1, 2, 2, dtype=torch.int64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    network = random_network(1)
    tensors = _flat(network)
    layers = [(*tensors[8 * i : 8 * i + 8], None, None, i > 0) for i in range(3)]
    head = list(network.head)
    draw = pyzoo._C.pixelcnn_sample_cpu
    draw(layers, head, uniforms, samples, None, 1.0)
    for message, arguments in (
        ("uniforms: axis 3 must have 2 elements", (layers, head, uniforms[..., :1], samples, None, 1.0)),
        (
            "link_weight must be contiguous",
            ([(*layers[0][:4], layers[0][4].transpose(0, 1), *layers[0][5:])], head),
        ),
        ("at least one layer", ([], head)),
        ("a residual needs as many inputs", (layers[1:], head)),
        ("head: axis 1", (layers, head[1:])),
        ("condition must have shape", ([(*layers[0][:8], torch.zeros(1, 2, 2, 5).double(), None, False)], head)),
        (
            "head must give at least 2 levels",
            (layers, [*head, (torch.zeros(1, 4, 1, 1).double(), torch.zeros(1).double())]),
        ),
        ("where known, got 9", (layers, head, uniforms, samples + 9, None, 1.0)),
        ("logits: axis 2", (layers, head, uniforms, samples, torch.zeros(1, 1, 3, 2, 2).double(), 1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            draw(*arguments, *(uniforms, samples, None, 1.0)[len(arguments) - 2 :])
