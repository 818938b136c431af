"""Reversible stacks: benchmark cases, a training step each. ``tests/test_reversible.py`` has the tests.

pyzoo and its peers run the same modules; what differs is what is stored for the backward pass.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyzoo.nn import ReversibleBlock, ReversibleSequential
from pyzoo.ops.reversible import reversible_reference
from tests.specs import inputs
from tests.specs.spec import BenchCase, OpSpec


def training_step(forward, stack: ReversibleSequential, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of the input and of all parameters."""
    x = x.detach().requires_grad_()
    out = forward(stack, x)
    return out.detach(), *torch.autograd.grad(out, [x, *stack.parameters()], grad)


def reversible(*args):
    return training_step(lambda stack, x: stack(x), *args)


def stored(*args):
    def forward(stack, x):
        return reversible_reference([function for block in stack for function in (block.f, block.g)], x, stack[0].dim)

    return training_step(forward, *args)


def checkpointed(*args):
    """Stores the halves between blocks, and runs each block again."""

    def forward(stack, x):
        def run(block, a, b):
            a = a + block.f(b)
            return a, b + block.g(a)

        a, b = x.chunk(2, stack[0].dim)
        for block in stack:
            a, b = checkpoint(run, block, a, b, use_reentrant=False)
        return torch.cat([a, b], stack[0].dim)

    return training_step(forward, *args)


@functools.lru_cache(maxsize=1)
def memcnn_twin(stack: ReversibleSequential) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import memcnn

    couplings = [memcnn.AdditiveCoupling(Fm=block.f, Gm=block.g) for block in stack]
    wrappers = [memcnn.InvertibleModuleWrapper(fn=c, keep_input=False, keep_input_inverse=True) for c in couplings]
    return nn.Sequential(*wrappers)


def memcnn_step(stack, x, grad):
    """It frees the input, and knows ``.backward()`` alone."""
    x = x.detach().requires_grad_()
    stack.zero_grad()
    out = memcnn_twin(stack)(x.clone())
    out.backward(grad)
    return out.detach(), x.grad, *(p.grad for p in stack.parameters())


def normed_conv(channels: int, out: int, size: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, out, size, padding=size // 2, bias=False)]


FUNCTIONS = {  # what f and g are for so many channels: the two kinds of RevNet, less than those, and one for tokens
    "basic": lambda c: nn.Sequential(*normed_conv(c, c, 3), *normed_conv(c, c, 3)),
    "bottleneck": lambda c: nn.Sequential(
        *normed_conv(c, c // 4, 1), *normed_conv(c // 4, c // 4, 3), *normed_conv(c // 4, c, 1)
    ),
    "one 3x3": lambda c: nn.Sequential(*normed_conv(c, c, 3)),
    "MLP": lambda c: nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c)),
}

BENCH = (  # kind of f and g, shape of the input, numbers of blocks, those run by --quick
    ("basic", (8, 64, 16, 16), (8, 16, 32, 64), (8,)),
    ("one 3x3", (16, 32, 32, 32), (8, 16, 32, 64), ()),
    ("basic", (4, 128, 16, 16), (16,), ()),
    ("basic", (4, 128, 8, 8), (64,), ()),
    ("bottleneck", (8, 256, 16, 16), (8, 32), ()),
    ("MLP", (8, 128, 128), (8, 32), ()),
    ("one 3x3", (2, 8, 4, 4), (8,), (8,)),  # tiny
)
GROWTH = 2  # the first so many are those that show how memory grows, for each peer


def forward_flops(function: nn.Module, shape: tuple[int, ...]) -> float:
    weights = sum(p.numel() for p in function.parameters() if p.dim() > 1)
    return 2.0 * weights * (shape[0] * shape[1] if len(shape) == 3 else shape[0] * shape[2] * shape[3])


def bench(rows=BENCH):
    for kind, shape, depths, quick in rows:
        layouts = ["NCHW", "NHWC"] if len(shape) == 4 else ["rows"]
        for depth in depths:
            for layout in layouts:

                def make(kind=kind, shape=shape, depth=depth, layout=layout):
                    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
                    dim = 1 if len(shape) == 4 else -1
                    torch.manual_seed(0)
                    functions = [FUNCTIONS[kind](shape[dim] // 2) for _ in range(2 * depth)]
                    blocks = [ReversibleBlock(f, g, dim) for f, g in zip(functions[::2], functions[1::2], strict=True)]
                    stack = ReversibleSequential(*blocks).to(memory_format=memory_format)
                    x, grad = (inputs.features(*shape, memory_format=memory_format, seed=seed) for seed in (1, 2))
                    return (stack, x, grad), {}

                group = f"{kind} {'x'.join(map(str, shape))} {layout}"
                function = FUNCTIONS[kind](shape[1 if len(shape) == 4 else -1] // 2)
                yield BenchCase(
                    f"{group}, {depth} blocks",
                    group,
                    make,
                    size=depth,
                    # Forward, forward again, and two products for the gradients.
                    floor_flops=4 * 2 * depth * forward_flops(function, shape),
                    quick=depth in quick,
                    step=True,
                )


SPEC = OpSpec(
    name="reversible_vs_stored",
    op=reversible,
    reference=stored,
    samples=None,
    errors=None,
    bench=bench,
    peer=stored,
    peer_name="stored activations",
    # Single gradients change by a tenth of the largest when rounding moves a value over the kink of a ReLU, stored or
    # rebuilt: both are as far from float64. The tests compare in float64, to 1e-10.
    tolerances={torch.float32: (1e-2, 0.3)},
)
CHECKPOINT = replace(
    SPEC,
    name="reversible_vs_checkpoint",
    bench=lambda: bench((*BENCH[:GROWTH], BENCH[-1])),
    peer=checkpointed,
    peer_name="torch.utils.checkpoint",
)
if importlib.util.find_spec("memcnn"):
    MEMCNN = replace(CHECKPOINT, name="reversible_vs_memcnn", peer=memcnn_step, peer_name="memcnn")
