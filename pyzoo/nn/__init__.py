"""Modules around the operators of :mod:`pyzoo.ops`, with the arguments of what they replace."""

from pyzoo.ops.depthwise_conv2d import DepthwiseConv2d
from pyzoo.ops.roi_align import MultiScaleRoIAlign, RoIAlign
from pyzoo.ops.roi_pool import RoIPool

__all__ = ["DepthwiseConv2d", "MultiScaleRoIAlign", "RoIAlign", "RoIPool"]
