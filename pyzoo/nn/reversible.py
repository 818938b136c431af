"""Reversible blocks, whose backward pass rebuilds the activations from the output. Gomez et al., "The Reversible
Residual Network", 2017 (https://arxiv.org/abs/1707.04585).

The modules alone: the backward pass is in :mod:`pyzoo.nn._reversible_function`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyzoo.nn._reversible_function import stack_forward, stack_inverse
from pyzoo.ops import _common as common


class ReversibleBlock(nn.Module):
    """y1 = x1 + f(x2), y2 = x2 + g(y1) on the halves of the input along ``dim``, with a backward pass that needs the
    output alone.

    In a stack use :class:`ReversibleSequential`, which keeps one activation for all blocks together; everything said
    there holds here.

    Args:
        f, g: modules that map a half to a tensor of its shape.
        dim: the dimension that is split, by default the channels; its size must be even.

    Raises:
        TypeError: ``f`` or ``g`` is no ``nn.Module`` (the parameters of another callable would get no gradients).
    """

    def __init__(self, f: nn.Module, g: nn.Module, dim: int = 1):
        super().__init__()
        for name, function in (("f", f), ("g", g)):
            if not isinstance(function, nn.Module):
                raise TypeError(f"ReversibleBlock: {name} must be an nn.Module, got {type(function).__name__}")
        if type(dim) is not int:
            raise TypeError(f"ReversibleBlock: dim must be an int, got {dim!r}")
        self.f = f
        self.g = g
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        _check_halves("ReversibleBlock", "input", input, self.dim)
        return stack_forward(self._functions("ReversibleBlock: "), input, self.dim)

    def inverse(self, output: Tensor) -> Tensor:
        """The input that gives ``output``, for ``f`` and ``g`` without randomness. Running statistics stay as they are.

        Differentiable, as an ordinary function.
        """
        _check_halves("ReversibleBlock", "output", output, self.dim)
        return stack_inverse(self._functions("ReversibleBlock: "), output, self.dim)

    def _functions(self, prefix: str) -> list[tuple[str, nn.Module]]:
        return [(prefix + "f", self.f), (prefix + "g", self.g)]

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class ReversibleSequential(nn.Sequential):
    """A stack of blocks (:class:`ReversibleBlock`) that stores one activation, its output, whatever its depth.

    The backward pass rebuilds the input of each block from its output and costs one more forward pass: 4/3 of the time
    of a training step. Names in the state dict are those of ``nn.Sequential``: ``0.f.weight``.

    Each function runs twice, and the second run is like the first: the same random numbers (of torch's generators, CPU
    and the device of the input), train or eval mode, buffers and autocast. What a function changes in its buffers is
    changed once, as are batch-norm statistics; those of large maps are kept, not found again. Forward hooks of modules
    inside of f and g see both runs; hooks of parameters see one gradient, summed over the whole stack. Parameters may
    be frozen or shared between blocks.

    Halves are kept and added in float32, or float64 for float64 input; f and g see them in the dtype of the input,
    which is also that of the output. float16 and bfloat16 input thus keeps two float32 halves instead of one output.

    ``create_graph=True``, batches of gradients, ``torch.func``, forward-mode derivatives and ``torch.export`` give the
    right result with ordinary graphs, which store activations; so does the call that initializes lazy modules. f and g
    may be compiled; ``torch.compile`` of a model around the stack breaks the graph here, to keep the memory flat,
    unless gradients are off.

    Args:
        blocks: the blocks, all with the same ``dim``.
        verify: compare each rebuilt half with fingerprints of the original, 16 KB for each function; True allows a
            relative difference of 1e-3 (1e-8 in float64), a number allows that. ``errors`` then has what the last
            backward pass found, by name. For debugging: tells of functions that are not deterministic and of blocks
            too steep to be rebuilt, for a fraction of the step's time.

    Raises:
        TypeError: a block is no ``ReversibleBlock``; the input is not floating or not dense; f or g returns no tensor
            or a wider dtype than its input and float32.
        ValueError: blocks differ in ``dim``; the size there is odd; f or g changes the shape or device.
        RuntimeError: f or g changes its input in place; in the backward pass: the output, a parameter or a buffer was
            changed in place since; f or g returns another dtype than before, or uses tensors that require grad and are
            not its parameters; ``verify`` found a difference.
    """

    def __init__(self, *blocks: ReversibleBlock, verify: bool | float = False):
        super().__init__(*blocks)
        self.verify = verify
        self.errors: dict[str, float] = {}
        self._functions()

    def forward(self, input: Tensor) -> Tensor:
        functions, dim = self._functions()
        if not functions:
            return input
        _check_halves("ReversibleSequential", "input", input, dim)
        if not self.verify:
            return stack_forward(functions, input, dim)
        allowed = self.verify
        if allowed is True:
            allowed = 1e-8 if input.dtype == torch.float64 else 1e-3
        self.errors = {}
        return stack_forward(functions, input, dim, allowed, self.errors)

    def inverse(self, output: Tensor) -> Tensor:
        """The input that gives ``output``; see :meth:`ReversibleBlock.inverse`."""
        functions, dim = self._functions()
        if not functions:
            return output
        _check_halves("ReversibleSequential", "output", output, dim)
        return stack_inverse(functions, output, dim)

    def _functions(self) -> tuple[list[tuple[str, nn.Module]], int]:
        """f and g of all blocks in order, with their names, and the dimension that is split."""
        functions, dim = [], None
        for i, block in enumerate(self):
            name = f"ReversibleSequential: blocks[{i}]"
            if not isinstance(block, ReversibleBlock):
                raise TypeError(f"{name} must be a ReversibleBlock, got {type(block).__name__}")
            if dim not in (None, block.dim):
                raise ValueError(f"{name} must split dim={dim} as those before it, got dim={block.dim}")
            dim = block.dim
            functions += block._functions(f"{name}.")
        return functions, dim


def _check_halves(op: str, name: str, x: Tensor, dim: int) -> None:
    common.check_tensor(op, name, x)
    common.check_floating(op, name, x)
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be dense (torch.strided), got layout {x.layout}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: {name} must have dimension dim={dim}, which is split, got shape {list(x.shape)}")
    if x.shape[dim] % 2:
        raise ValueError(
            f"{op}: {name} must have an even size in dimension dim={dim}, which is split, got shape {list(x.shape)}"
        )
