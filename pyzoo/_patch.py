"""``pyzoo.patch("torchvision")``: pyzoo's kernels under another package's operators, for every project in the process.

The kernels go into torch's dispatcher, ``torch.ops.torchvision.*`` on the CPU; nothing of torchvision itself is
replaced. Its autograd, autocast and fake implementations stay, as do its Python functions, which all end in these
operators. What pyzoo cannot serve goes on to the original kernel, so errors stay torchvision's. The original is taken
by ``torch.library.get_kernel`` and called with ``call_boxed``; destroying the overrides' ``Library`` puts it back.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import ClassVar


class Patch:
    """What :func:`patch` did, and how to undo it; a context manager that may be entered again and within itself."""

    def __init__(self, target: str, kernels: dict[str, Kernel]):
        self.target = target
        self._kernels = kernels
        self._depth = 0
        self._installed = False
        self.install()

    def install(self) -> None:
        """Puts the kernels in place if this patch has not already."""
        with _lock:
            if not self._installed:
                _Overrides.acquire(self.target, self._kernels)
                self._installed = True

    def undo(self) -> None:
        """Takes the kernels out again, unless another patch of the same target still wants them."""
        with _lock:
            if self._installed:
                _Overrides.release(self.target)
                self._installed = False

    @property
    def ops(self) -> dict[str, str]:
        """``torchvision::nms`` and so on -> "patched", or why the original was left in place."""
        overrides = _Overrides.active.get(self.target) if self._installed else None
        if overrides is None:
            return {f"{self.target}::{name}": "original: this patch is undone" for name in self._kernels}
        return {f"{self.target}::{name}": status for name, status in overrides.status.items()}

    def __enter__(self) -> Patch:
        self._depth += 1
        self.install()
        return self

    def __exit__(self, *_) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.undo()

    def __repr__(self) -> str:
        width = max(map(len, self.ops))
        lines = [f"  {op:{width}}  {status}" for op, status in self.ops.items()]
        return "\n".join([f"pyzoo.patch({self.target!r}), CPU:", *lines])


class _Overrides:
    """The kernels of one target in the dispatcher, shared by all patches of it."""

    active: ClassVar[dict[str, _Overrides]] = {}

    def __init__(self, target: str, kernels: dict[str, Kernel]):
        import torch

        self.holders = 0
        self.status = {}
        self.library = torch.library.Library(target, "IMPL")
        for name, kernel in kernels.items():
            self.status[name] = self._override(f"{target}::{name}", kernel)

    def _override(self, op: str, kernel: Kernel) -> str:
        import torch

        namespace, name = op.split("::")
        if not hasattr(getattr(torch.ops, namespace), name):
            return f"left: this {namespace} has no such operator"
        try:
            original = torch.library.get_kernel(op, "CPU")
        except RuntimeError as error:
            return f"left: it has no CPU kernel ({str(error).splitlines()[0]})"
        with warnings.catch_warnings():  # older torch warns in spite of allow_override
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            self.library.impl(name, _with_fallback(kernel, original), "CPU", with_keyset=True, allow_override=True)
        return "patched"

    @classmethod
    def acquire(cls, target: str, kernels: dict[str, Kernel]) -> None:
        if target not in cls.active:
            cls.active[target] = cls(target, kernels)
        cls.active[target].holders += 1

    @classmethod
    def release(cls, target: str) -> None:
        overrides = cls.active[target]
        overrides.holders -= 1
        if overrides.holders == 0:
            del cls.active[target]
            overrides.library._destroy()  # what torch.library._scoped_library ends with; brings the original back


_lock = threading.RLock()

Kernel = tuple[Callable, Callable]  # raises TypeError or ValueError for what pyzoo does not serve; computes


def _with_fallback(kernel: Kernel, original) -> Callable:
    """The kernel, or the original where the check refuses the arguments."""
    check, run = kernel

    def call(keyset, *args):
        try:
            check(*args)
        except (TypeError, ValueError):
            pass
        else:
            return run(*args)
        return original.call_boxed(keyset, *args)

    return call


def _torchvision_kernels() -> dict[str, Kernel]:
    """Operator name -> kernel with torchvision's arguments and results; as there, those of the pooling are contiguous.

    An image index out of range raises here instead of going on to the original, which reads whatever memory is there.
    """
    try:
        import torchvision.extension
    except ImportError as error:
        raise ImportError(
            f"pyzoo.patch('torchvision') needs torchvision; install it with: pip install torchvision ({error})"
        ) from error
    if not torchvision.extension._has_ops():
        raise ImportError(
            "pyzoo.patch('torchvision'): this torchvision did not load its own operators; its version must fit torch's"
        )
    import torch

    from pyzoo._ext import C
    from pyzoo.ops import _common as common
    from pyzoo.ops.nms import _check as check_nms
    from pyzoo.ops.nms import _kept as kept

    C.build_info()  # a core that does not load says so here, not at the first detection

    def nms(dets, scores, iou_threshold):
        return kept(dets, scores, None, iou_threshold, False)

    def check_pooling(input, rois, spatial_scale, pooled_height, pooled_width, *_):
        common.check_features_and_boxes("roi", "input", input, rois)
        common.check_pooling("roi", spatial_scale, pooled_height, pooled_width)

    def check_backward(grad, rois, spatial_scale, pooled_height, pooled_width, batch_size, channels, *_):
        common.check_grad_output("roi", grad, rois, channels, pooled_height, pooled_width)
        common.check_pooling("roi", spatial_scale, pooled_height, pooled_width)

    def check_pool_backward(grad, rois, argmax, *rest):
        check_backward(grad, rois, *rest)
        if argmax.shape != grad.shape or argmax.dtype != torch.int32:
            raise ValueError("argmax")

    def roi_align(input, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
        output = input.new_empty(rois.shape[0], input.shape[1], pooled_height, pooled_width)
        C.roi_align_fwd_cpu([input], rois, output, [spatial_scale], sampling_ratio, aligned, None)
        return output

    def roi_align_backward(
        grad, rois, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width, ratio, aligned
    ):
        grad_input = grad.new_empty(batch_size, channels, height, width)
        C.roi_align_bwd_cpu(grad, rois, [grad_input], [spatial_scale], ratio, aligned, None)
        return grad_input

    def roi_pool(input, rois, spatial_scale, pooled_height, pooled_width):
        output = input.new_empty(rois.shape[0], input.shape[1], pooled_height, pooled_width)
        argmax = torch.empty_like(output, dtype=torch.int32)
        C.roi_pool_fwd_cpu(input, rois, output, argmax, spatial_scale)
        return output, argmax

    def roi_pool_backward(
        grad, rois, argmax, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width
    ):
        grad_input = grad.new_empty(batch_size, channels, height, width)
        C.roi_pool_bwd_argmax_cpu(grad, rois, argmax, grad_input)
        return grad_input

    return {
        "nms": (partial(check_nms, "nms"), nms),
        "roi_align": (check_pooling, roi_align),
        "_roi_align_backward": (check_backward, roi_align_backward),
        "roi_pool": (check_pooling, roi_pool),
        "_roi_pool_backward": (check_pool_backward, roi_pool_backward),
    }


_TARGETS = {"torchvision": _torchvision_kernels}


def patch(target: str) -> Patch:
    """Puts pyzoo's CPU kernels under the operators of ``target``, for the whole process.

    ::

        pyzoo.patch("torchvision")  # stays; returns what it did, .undo() takes it back

        with pyzoo.patch("torchvision"):  # undone at the end
            detections = model(images)

    With "torchvision" these are ``nms``, ``roi_align``, ``roi_pool`` and the backwards of the last two, so its
    functions, modules and models gain, and every package built on them. Kept boxes are the same, pooled values agree to
    rounding. bfloat16 and mixed dtypes, which torchvision refuses on the CPU, work; an image index out of range raises
    ValueError instead of reading stray memory. All else that pyzoo refuses goes to the original kernel. Applies to all
    threads; patches nest, and the originals return when the last one is undone.

    Args:
        target: "torchvision".

    Returns:
        :class:`Patch`, whose repr lists each operator as patched or left, with the reason.

    Raises:
        ImportError: the target is not installed, or pyzoo's compiled core does not load.
        ValueError: there is no such target.
    """
    if target not in _TARGETS:
        raise ValueError(f"patch: target must be one of {', '.join(map(repr, _TARGETS))}, got {target!r}")
    return Patch(target, _TARGETS[target]())
