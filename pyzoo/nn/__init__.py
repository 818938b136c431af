"""Modules around the operators of :mod:`pyzoo.ops`, with the arguments of what they replace."""

from pyzoo.nn.reversible import ReversibleBlock, ReversibleSequential
from pyzoo.ops.roi_align import MultiScaleRoIAlign, RoIAlign
from pyzoo.ops.roi_pool import RoIPool

__all__ = ["MultiScaleRoIAlign", "ReversibleBlock", "ReversibleSequential", "RoIAlign", "RoIPool"]
