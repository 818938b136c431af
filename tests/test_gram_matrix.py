"""What the battery of test_ops.py cannot ask of the Gram matrix and its loss."""

import pytest
import torch

from pyzoo import nn, ops
from tests.specs import inputs

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_symmetric_to_the_last_bit(dtype, memory_format):
    for channels in (1, 7, 31, 48, 100):
        gram = ops.gram_matrix(inputs.features(2, channels, 25, 41, dtype=dtype, memory_format=memory_format))
        assert torch.equal(gram, gram.transpose(1, 2))


def test_same_bits_in_both_layouts():
    x = inputs.features(2, 70, 30, 41)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.gram_matrix(x), ops.gram_matrix(last))
    assert torch.equal(ops.gram_matrix(x), ops.gram_matrix(x.flatten(2)))
    target = inputs.features(70, 70)
    assert torch.equal(ops.gram_loss(x, target), ops.gram_loss(last, target))


def test_each_output_has_its_own_channels():
    """A channel of NaN spoils its row and its column, and nothing else."""
    x = inputs.features(2, 70, 9, 9)
    x[1, 40, 3, 3] = torch.nan
    wrong = ops.gram_matrix(x).isnan()
    expected = torch.zeros(2, 70, 70, dtype=torch.bool)
    expected[1, 40, :] = expected[1, :, 40] = True
    assert torch.equal(wrong, expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_on_large_maps(dtype, memory_format):
    """Sums of 250000 squares of numbers near 200: each alone is at the end of float16, the sum far beyond it."""
    x = inputs.features(1, 12, 500, 500).add(1).mul(150).to(dtype).contiguous(memory_format=memory_format)
    exact = ops.gram_matrix_reference(x.double())
    gram = ops.gram_matrix(x)
    assert gram.isfinite().all()
    torch.testing.assert_close(gram.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    loss = ops.gram_loss(x, torch.zeros_like(gram))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact.square().mean(), rtol=1e-5, atol=0)


def test_sums_of_many_positions_stay_accurate():
    x = inputs.features(1, 16, 512, 512).abs()
    exact = ops.gram_matrix_reference(x.double())
    torch.testing.assert_close(ops.gram_matrix(x).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_equations_of_the_paper(normalize):
    """Gatys et al. 2015, equations 4 and 6: the loss of a layer and its gradient."""
    generated, style = (inputs.features(1, 5, 6, 7, dtype=torch.float64, seed=seed) for seed in (1, 2))
    count = 5 * 6 * 7
    f = generated.flatten(2)
    difference = f @ f.mT - style.flatten(2) @ style.flatten(2).mT
    scale = 1 / count if normalize else 1
    target = ops.gram_matrix(style, normalize=normalize)
    loss = ops.gram_loss(generated.requires_grad_(), target, normalize=normalize)
    energy = difference.square().sum() / (4 * count**2)
    torch.testing.assert_close(loss * 5**2 / 4 / scale**2 / count**2, energy)
    loss.backward()
    gradient = (difference @ f / count**2).view_as(generated)
    torch.testing.assert_close(generated.grad * 5**2 / 4 / scale**2 / count**2, gradient)
    assert ops.gram_loss(style, target, normalize=normalize) == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 20, 20), (1, 20, 20), (20, 20)])
def test_gradient_of_the_target(dtype, shape):
    features = inputs.features(3, 20, 9, 7, dtype=dtype)
    target = inputs.features(*shape, dtype=dtype, seed=1)

    def gradients(op):
        leaves = [x.clone().requires_grad_() for x in (features, target)]
        return torch.autograd.grad(op(*leaves) * 1000, leaves)

    for got, want in zip(gradients(ops.gram_loss), gradients(ops.gram_loss_reference), strict=True):
        assert got.dtype == dtype
        rtol = 1e-5 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * want.abs().max().item())


def test_only_the_target_requires_grad():
    target = inputs.features(4, 4).requires_grad_()
    ops.gram_loss(inputs.features(2, 4, 5, 5), target).backward()
    assert target.grad.shape == (4, 4)


def test_gradient_keeps_the_layout_of_three_dimensions():
    x = inputs.features(2, 30, 6).transpose(1, 2).requires_grad_()
    ops.gram_matrix(x).sum().backward()
    assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("normalize", [True, False])
def test_nothing_gives_zeros_not_nan(normalize):
    no_positions = torch.zeros(2, 3, 0, 4, requires_grad=True)
    gram = ops.gram_matrix(no_positions, normalize=normalize)
    assert torch.equal(gram, torch.zeros(2, 3, 3))
    gram.sum().backward()
    assert no_positions.grad.shape == (2, 3, 0, 4)
    assert ops.gram_loss(no_positions, torch.full((3, 3), 2.0), normalize=normalize) == 4
    assert ops.gram_matrix(torch.zeros(2, 0, 3, 4), normalize=normalize).shape == (2, 0, 0)
    assert ops.gram_loss(torch.zeros(2, 0, 3, 4), torch.zeros(0, 0), normalize=normalize) == 0
    assert ops.gram_loss(torch.zeros(0, 5, 3, 4), torch.zeros(5, 5), normalize=normalize) == 0


def test_style_transfer_converges():
    """Gradient descent on the features finds ones with the Gram matrix of the style."""
    target = ops.gram_matrix(inputs.features(1, 6, 8, 8, seed=1))
    x = inputs.features(1, 6, 8, 8, seed=2).requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = ops.gram_loss(x, target)
        loss.backward()
        return loss

    first = closure().item()
    optimizer.step(closure)
    assert closure().item() < 1e-6 * first


def test_modules():
    x, target = inputs.features(2, 6, 5, 5), inputs.features(6, 6)
    assert torch.equal(nn.GramMatrix()(x), ops.gram_matrix(x))
    assert torch.equal(nn.GramMatrix(normalize=False)(x), ops.gram_matrix(x, normalize=False))
    assert torch.equal(nn.GramLoss()(x, target), ops.gram_loss(x, target))
    assert torch.equal(nn.GramLoss(normalize=False)(x, target), ops.gram_loss(x, target, normalize=False))
    assert str(nn.GramMatrix()) == "GramMatrix(normalize=True)"
    assert str(nn.GramLoss(normalize=False)) == "GramLoss(normalize=False)"
    assert not nn.GramLoss().state_dict()
