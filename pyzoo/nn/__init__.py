"""Modules around the operators of :mod:`pyzoo.ops`, with the arguments of what they replace."""

from pyzoo.ops.gram_matrix import GramLoss, GramMatrix
from pyzoo.ops.roi_align import MultiScaleRoIAlign, RoIAlign
from pyzoo.ops.roi_pool import RoIPool

__all__ = ["GramLoss", "GramMatrix", "MultiScaleRoIAlign", "RoIAlign", "RoIPool"]
