"""The operators, with torchvision's signatures where it has them; each is also ``torch.ops.pyzoo.<name>``."""

from pyzoo.ops.depthwise_conv2d import DepthwiseConv2d, depthwise_conv2d, depthwise_conv2d_reference
from pyzoo.ops.nms import batched_nms, batched_nms_reference, nms, nms_reference
from pyzoo.ops.roi_align import (
    MultiScaleRoIAlign,
    RoIAlign,
    multiscale_roi_align,
    multiscale_roi_align_reference,
    roi_align,
    roi_align_reference,
)
from pyzoo.ops.roi_pool import RoIPool, roi_pool, roi_pool_reference

__all__ = [
    "DepthwiseConv2d",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "RoIPool",
    "batched_nms",
    "batched_nms_reference",
    "depthwise_conv2d",
    "depthwise_conv2d_reference",
    "multiscale_roi_align",
    "multiscale_roi_align_reference",
    "nms",
    "nms_reference",
    "roi_align",
    "roi_align_reference",
    "roi_pool",
    "roi_pool_reference",
]
