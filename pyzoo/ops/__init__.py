"""The operators, with torchvision's signatures where it has them; each is also ``torch.ops.pyzoo.<name>``."""

from pyzoo.ops.nms import batched_nms, batched_nms_reference, nms, nms_reference
from pyzoo.ops.pixelcnn_sampler import (
    PixelCNNLayer,
    PixelCNNNetwork,
    pixelcnn_logits_reference,
    pixelcnn_sample,
    pixelcnn_sample_reference,
)
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
    "MultiScaleRoIAlign",
    "PixelCNNLayer",
    "PixelCNNNetwork",
    "RoIAlign",
    "RoIPool",
    "batched_nms",
    "batched_nms_reference",
    "multiscale_roi_align",
    "multiscale_roi_align_reference",
    "nms",
    "nms_reference",
    "pixelcnn_logits_reference",
    "pixelcnn_sample",
    "pixelcnn_sample_reference",
    "roi_align",
    "roi_align_reference",
    "roi_pool",
    "roi_pool_reference",
]
