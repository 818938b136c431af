"""DepthwiseConv2d as an nn.Conv2d; the numbers are in the battery."""

import pytest
import torch
from torch import nn

import pyzoo.ops
from pyzoo.nn import DepthwiseConv2d
from tests.specs import inputs

X = torch.randn(2, 4, 9, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_state_dicts_load_both_ways(mode):
    ours = DepthwiseConv2d(4, (3, 5), padding=(1, 2), multiplier=2, padding_mode=mode)
    theirs = nn.Conv2d(4, 8, (3, 5), padding=(1, 2), groups=4, padding_mode=mode)
    assert isinstance(ours, nn.Conv2d)
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            source.weight.normal_()
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(ours(X), theirs(X))


def test_what_the_kernels_do_not_take_goes_to_torch():
    conv = DepthwiseConv2d(4, 3, dtype=torch.complex64)
    want = nn.functional.conv2d(X.cfloat(), conv.weight, conv.bias, groups=4)
    torch.testing.assert_close(conv(X.cfloat()), want)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bias_gradient_has_the_same_bits_for_any_number_of_threads(memory_format, set_threads):
    """Of one channel, where a sum in torch is shared out among the threads."""
    x = inputs.features(8, 1, 112, 112).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(1, 1, 3, 3), torch.zeros(1, requires_grad=True)
    grads = []
    for threads in (1, 2, 4):
        set_threads(threads)
        out = pyzoo.ops.depthwise_conv2d(x, weight, bias, padding=1)
        grads.append(torch.autograd.grad(out, bias, x)[0])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
