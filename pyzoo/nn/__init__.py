"""Modules around the operators of :mod:`pyzoo.ops`, with the arguments of what they replace."""

from pyzoo.nn.batch_norm import FrozenBatchNorm2d
from pyzoo.nn.conv import conv_bn
from pyzoo.nn.reversible import ReversibleBlock, ReversibleSequential
from pyzoo.ops.depthwise_conv2d import DepthwiseConv2d
from pyzoo.ops.gram_matrix import GramLoss, GramMatrix
from pyzoo.ops.masked_conv2d import MaskedConv2d
from pyzoo.ops.roi_align import MultiScaleRoIAlign, RoIAlign
from pyzoo.ops.roi_pool import RoIPool
from pyzoo.ops.spatial_pyramid_pool2d import SpatialPyramidPool2d

__all__ = [
    "DepthwiseConv2d",
    "FrozenBatchNorm2d",
    "GramLoss",
    "GramMatrix",
    "MaskedConv2d",
    "MultiScaleRoIAlign",
    "ReversibleBlock",
    "ReversibleSequential",
    "RoIAlign",
    "RoIPool",
    "SpatialPyramidPool2d",
    "conv_bn",
]
