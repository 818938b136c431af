"""Reversible blocks, whose backward pass rebuilds the activations from the output. Gomez et al., "The Reversible
Residual Network", 2017 (https://arxiv.org/abs/1707.04585).

One ``autograd.Function`` spans the whole stack. Its forward keeps the output and no other activation. Its backward
walks the functions f, g, f, g ... from the last to the first: it runs each one again, now with a graph, takes its
gradients, subtracts its value from the half it had been added to, and drops the graph.

The second run must be like the first. ``_Part``, the record of one function in one call, restores train or eval mode,
random numbers and buffers, keeps running statistics from being updated twice, and checks that parameters are the same.
``_Call``, the record of the call, restores autocast and adds up the gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from pyzoo.ops import _common as common
from pyzoo.ops.reversible import couple, reversible_reference, uncouple, uncouple_with_grad

# In training mode these normalize with the statistics of the batch; without tracking they do just that and no more.
_TRACKING_FORWARDS = {_BatchNorm.forward, SyncBatchNorm.forward}
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-8}  # of verify=True: relative, for a half as it comes back
_graph_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _run(function: nn.Module, name: str, x: Tensor) -> Tensor:
    """``function(x)``, which has to leave ``x`` alone and to keep its shape."""
    version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
    out = function(x)
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(out).__name__}")
    if out.shape != x.shape or out.device != x.device:
        raise ValueError(
            f"{name} must keep shape and device of its input, {list(x.shape)} on {x.device}, "
            f"got {list(out.shape)} on {out.device}"
        )
    if out.dtype not in common._FLOATS or (out.dtype == torch.float64) > (x.dtype == torch.float64):
        raise TypeError(f"{name} must return {x.dtype}, float32 or a narrower floating dtype, got {out.dtype}")
    if version is not None and x._version != version:
        raise RuntimeError(f"{name} modifies its input in place, as ReLU(inplace=True) does in the first place")
    return out


class _Part:
    """One f or g in one call: the module, and all that its second run depends on."""

    def __init__(self, name: str, module: nn.Module):
        self.name, self.module = name, module
        self.modes: list[tuple[nn.Module, bool]] = []
        self.parameters: list[tuple[dict, str, Tensor]] = []  # where each one is
        self.buffers: list[tuple[dict, str, Tensor]] = []  # that the module changes, as they were before
        self.constants: list[tuple[dict, str, Tensor]] = []  # buffers that it only reads
        self.owners: list[dict] = []  # of the one or the other kind
        self.norms: list[nn.Module] = []
        self.rng: list[Tensor] | None = None
        self.dtype: torch.dtype | None = None
        self.fingerprint: Tensor | None = None
        modules, seen = [module], set()
        while modules:
            m = modules.pop()
            if m is None or m in seen:
                continue
            seen.add(m)
            if "training" in vars(m):  # a compiled module passes it on
                self.modes.append((m, m.training))
            self.parameters += [(m._parameters, key, p) for key, p in m._parameters.items() if p is not None]
            if m._buffers:
                if type(m).forward in _TRACKING_FORWARDS and m.training and m.track_running_stats:
                    self.norms.append(m)
                else:
                    self.owners.append(m._buffers)
            modules += m._modules.values()
        self.trainable = list({id(p): p for _, _, p in self.parameters if p.requires_grad}.values())

    def run(self, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The first run. Notes which random numbers and buffers it uses up."""
        rng = [generator.get_state() for generator in generators]
        before = [(o, key, b, b._version, b.clone()) for o in self.owners for key, b in o.items() if b is not None]
        out = _run(self.module, self.name, x)
        self.dtype = out.dtype
        if not all(torch.equal(g.get_state(), state) for g, state in zip(generators, rng, strict=True)):
            self.rng = rng
        for owner, key, b, version, copy in before:
            if owner.get(key) is b and b._version == version:
                self.constants.append((owner, key, b))
            else:
                self.buffers.append((owner, key, copy))
        self.versions = [(key, t, t._version) for _, key, t in (*self.parameters, *self.constants)]
        return out

    def run_again(self, x: Tensor, generators: Sequence[torch.Generator], stand_ins: dict[int, Tensor]) -> Tensor:
        """The second run, as the first but for parameters that have a stand-in, by the id of the parameter."""
        undo = []

        def put(owner: dict, key: str, value) -> None:
            if owner[key] is not value:
                undo.append((owner, key, owner[key]))
                owner[key] = value

        for module, training in self.modes:
            put(module.__dict__, "training", training)
        for module in self.norms:
            put(module.__dict__, "track_running_stats", False)
        for owner, key, p in self.parameters:
            put(owner, key, stand_ins.get(id(p), p))
        for owner, key, b in self.buffers:
            put(owner, key, b.clone())
        if self.rng:
            for generator, state in zip(generators, self.rng, strict=True):
                generator.set_state(state)
        try:
            out = _run(self.module, self.name, x)
        finally:
            for owner, key, value in reversed(undo):
                owner[key] = value
        if out.dtype != self.dtype:
            raise RuntimeError(f"{self.name} returned {self.dtype} in the forward pass, now {out.dtype}")
        return out

    def check_unchanged(self) -> None:
        for key, t, version in self.versions:
            if t._version != version:
                raise RuntimeError(
                    f"{self.name}: '{key}' of shape {list(t.shape)} was modified in place between forward and backward"
                )

    def check_graph(self, out: Tensor, known: Sequence[Tensor]) -> None:
        """Raises if the graph of ``out`` reaches a leaf that is none of ``known``: its gradient would be lost."""
        ids, nodes, seen = {id(t) for t in known}, [out.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in ids:
                raise RuntimeError(
                    f"{self.name} uses a tensor of shape {list(leaf.shape)} that requires grad but is neither its "
                    "input nor one of its parameters: its gradient would be lost"
                )
            nodes += [following for following, _ in node.next_functions]


class _Call:
    """One call of a stack for which gradients may be wanted."""

    def __init__(
        self, functions: Sequence[tuple[str, nn.Module]], dim: int, dtype: torch.dtype, verify: float | None, errors
    ):
        self.parts = [_Part(name, module) for name, module in functions]
        self.dim, self.dtype, self.verify, self.errors = dim, dtype, verify, errors
        self.parameters = list({id(p): p for part in self.parts for p in part.trainable}.values())

    def forward(self, x: Tensor) -> Tensor:
        self.autocast = _get_autocast(x.device)
        self.generators = _generators(x)

        def run(part: _Part, a: Tensor, b: Tensor) -> Tensor:
            if self.verify is not None:
                part.fingerprint = _fingerprint(a)
            return part.run(b, self.generators)

        with _set_autocast(self.autocast):
            return _couple_all([partial(run, part) for part in self.parts], x, self.dim, self.dtype)

    def backward(self, y: Tensor, grad_y: Tensor, x_needs_grad: bool) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the parameters."""
        for part in self.parts:
            part.check_unchanged()
        with _set_autocast(self.autocast), _restored(self.generators):
            if torch.is_grad_enabled():
                return self._differentiable_backward(y, grad_y)
            return self._backward(y, grad_y, x_needs_grad)

    def _backward(self, y: Tensor, grad_y: Tensor, x_needs_grad: bool) -> tuple[Tensor | None, ...]:
        # A function is differentiated beside the parameters' own hooks, which see the sum of all functions, once.
        stand_ins = {
            id(p): p.detach().requires_grad_() for p in self.parameters if p._backward_hooks or not p.requires_grad
        }
        grads: dict[int, Tensor] = {}
        a, b = y.chunk(2, self.dim)
        grad_a, grad_b = grad_y.chunk(2, self.dim)
        a, grad_b = _dense(a), _dense(grad_b)
        grad_x = None
        for k, part in reversed(list(enumerate(self.parts))):
            # a is what the function saw, b = (what is to be rebuilt) + function(a)
            needs_grad = k > 0 or x_needs_grad
            seen = self._input(a).requires_grad_(needs_grad)
            with torch.enable_grad():
                out = part.run_again(seen, self.generators, stand_ins)
            inputs = [stand_ins.get(id(p), p) for p in part.trainable]
            inputs = [seen, *inputs] if needs_grad else inputs
            found: list[Tensor | None] = [None] * len(inputs)
            if out.requires_grad:
                if part.module not in _graph_checked or self.verify is not None:
                    part.check_graph(out, inputs)
                    _graph_checked.add(part.module)
                if inputs:
                    found = list(torch.autograd.grad(out, inputs, grad_b.to(out.dtype), allow_unused=True))
            grad_seen = found.pop(0) if needs_grad else None
            for p, grad in zip(part.trainable, found, strict=True):
                if grad is not None:
                    grads[id(p)] = grads[id(p)] + grad if id(p) in grads else grad
            update = out.detach()
            del seen, out, found  # and the graph with them: nobody else sees the halves any more
            if k > 0 and grad_seen is not None:
                b, grad_a = uncouple_with_grad(b, update, grad_a, grad_seen)
            elif k > 0 or self.verify is not None:
                b = uncouple(b, update)
            if self.verify is not None:
                self._verify(part, b)
            if k > 0:
                a, b, grad_a, grad_b = b, a, grad_b, grad_a
            elif needs_grad:
                grad_x = torch.empty_like(y)
                first, second = grad_x.chunk(2, self.dim)
                first.copy_(grad_b)
                second.copy_(grad_a) if grad_seen is None else couple(grad_a, grad_seen, out=second)
        return grad_x, *(grads.get(id(p)) for p in self.parameters)

    def _differentiable_backward(self, y: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """The same as a function of y, with a graph: rebuilds x, then differentiates the ordinary forward pass.

        x depends on the parameters, too; stand-ins keep their gradients at constant x apart from that.
        """
        a, b = y.chunk(2, self.dim)
        for part in reversed(self.parts):
            a, b = b - part.run_again(a.to(self.dtype), self.generators, {}), a
        x = torch.cat([a, b], self.dim)
        stand_ins = {id(p): p.view_as(p) for p in self.parameters}
        functions = [
            lambda half, part=part: part.run_again(half.to(self.dtype), self.generators, stand_ins)
            for part in self.parts
        ]
        out = reversible_reference(functions, x, self.dim)
        inputs = [x, *stand_ins.values()]
        return torch.autograd.grad(out, inputs, grad_y, create_graph=True, allow_unused=True)

    def _input(self, half: Tensor) -> Tensor:
        """A tensor of its own for the function, so that it shows when somebody keeps it."""
        return half.detach() if half.dtype == self.dtype else half.to(self.dtype)

    def _verify(self, part: _Part, half: Tensor) -> None:
        error = _difference(_fingerprint(half), part.fingerprint)
        self.errors[part.name] = error
        if not error <= self.verify:
            raise RuntimeError(
                f"{part.name}: the input rebuilt from the output differs from the original by {error:.1e} relative, "
                f"allowed are {self.verify:.1e}: the function is not deterministic, or too steep to be rebuilt"
            )


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.call = call
        y = call.forward(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        (y,) = ctx.saved_tensors
        return None, *ctx.call.backward(y, grad_y, ctx.needs_input_grad[1])


def _couple_all(runs: Sequence[Callable[[Tensor, Tensor], Tensor]], x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The forward pass in place; ``run(a, b)`` returns what its function makes of b."""
    a, b = x.chunk(2, dim)
    b = _dense(b)
    y = None
    for k, run in enumerate(runs):
        update = run(a, b.detach() if b.dtype == dtype else b.to(dtype))
        if k < len(runs) - 1:
            a, b = b, couple(a, update)
        else:
            y = torch.empty_like(x)
            first, second = y.chunk(2, dim)
            first.copy_(b)
            couple(a, update, out=second)
    return y


def _dense(x: Tensor) -> Tensor:
    """``x``, or a copy if there are gaps in its memory, as in half of the channels of several images."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last or x.is_contiguous() else torch.empty_like(x).copy_(x)


def _generators(x: Tensor) -> list[torch.Generator]:
    """Where the functions may get random numbers from: the CPU, and the device of the input."""
    if isinstance(x, FakeTensor) or x.is_meta:
        return []
    if x.device.type == "cpu":
        return [torch.default_generator]
    return [torch.default_generator, torch.get_device_module(x.device).default_generators[x.device.index]]


@contextmanager
def _restored(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Nobody notices what is done to the generators meanwhile."""
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


_Autocast = dict[str, tuple[bool, torch.dtype]]


def _get_autocast(device: torch.device) -> _Autocast:
    kinds = [kind for kind in {"cpu", device.type} if torch.amp.is_autocast_available(kind)]
    return {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}


@contextmanager
def _set_autocast(autocast: _Autocast) -> Iterator[None]:
    """Autocast as in ``autocast``, but without its cache: a weight that was cast where no graph is recorded must not be
    found by who records one, and would keep memory besides."""
    before = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in autocast}
    cache = torch.is_autocast_cache_enabled()
    enabled = any(on for states in (before, autocast) for on, _ in states.values())
    if not enabled:
        yield
        return

    def set(state: _Autocast, cache: bool) -> None:
        for kind, (on, dtype) in state.items():
            torch.set_autocast_enabled(kind, on)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cache)
        torch.clear_autocast_cache()

    set(autocast, False)
    try:
        yield
    finally:
        set(before, cache)


def _fingerprint(half: Tensor) -> Tensor:
    """[2, buckets]: sums of the elements of ``half``, and how large such a sum is when signs are random."""
    buckets = max(1, min(1024, half.numel()))
    x = half.detach().to(torch.float64).flatten()
    x = nn.functional.pad(x, (0, -x.numel() % buckets))
    x = x.view(x.numel() // buckets, buckets)
    return torch.stack([x.sum(0), x.square().sum(0).sqrt()])


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two fingerprints; relative, unless all of ``expected`` is zero."""
    scale = torch.maximum(expected[1], expected[1].mean())
    scale[scale == 0] = 1
    return ((found[0] - expected[0]).abs() / scale).nan_to_num(torch.inf).max().item()


def _stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the halves. In 16 bits each block would lose what its update has beyond the last bit of the sum."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _call(
    functions: Sequence[tuple[str, nn.Module]],
    x: Tensor,
    dim: int,
    dtype: torch.dtype,
    verify: float | None,
    errors: dict[str, float],
) -> Tensor:
    """All functions on ``x``, whose halves they see in ``dtype``; by whichever of the ways the caller's modes allow."""
    by_graph = (
        torch.compiler.is_compiling()
        or common._functorch_active()
        or forward_ad._current_level >= 0
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )
    if not by_graph:
        if not torch.is_grad_enabled():
            runs = [lambda _, b, name=name, module=module: _run(module, name, b) for name, module in functions]
            return _couple_all(runs, x, dim, dtype)
        call = _Call(functions, dim, dtype, verify, errors)
        if (x.requires_grad or call.parameters) and not any(map(nn.parameter.is_lazy, call.parameters)):
            return _Reversible.apply(call, x, *call.parameters)
    runs = [lambda half, name=name, module=module: _run(module, name, half.to(dtype)) for name, module in functions]
    return reversible_reference(runs, x, dim)


@torch._disable_dynamo
def _reversible_outside_graph(*args) -> Tensor:
    return _call(*args)


# ------------------------------------------------------------------------------------------------------------- modules


def _reversible(
    op: str,
    functions: Sequence[tuple[str, nn.Module]],
    input: Tensor,
    dim: int,
    verify: float | None = None,
    errors=None,
) -> Tensor:
    _check_halves(op, "input", input, dim)
    graph_break = torch.compiler.is_compiling() and torch.is_grad_enabled() and not torch.compiler.is_exporting()
    call = _reversible_outside_graph if graph_break else _call
    x = input.to(_stream_dtype(input.dtype))
    return call(functions, x, dim, input.dtype, verify, errors).to(input.dtype)


def _inverse(op: str, functions: Sequence[tuple[str, nn.Module]], output: Tensor, dim: int) -> Tensor:
    _check_halves(op, "output", output, dim)
    norms = [
        m
        for _, function in functions
        for m in function.modules()
        if type(m).forward in _TRACKING_FORWARDS and m.training and m.track_running_stats
    ]
    for m in norms:
        m.track_running_stats = False
    try:
        a, b = output.to(_stream_dtype(output.dtype)).chunk(2, dim)
        for name, function in reversed(functions):
            a, b = b - _run(function, name, a.to(output.dtype)), a
    finally:
        for m in norms:
            m.track_running_stats = True
    return torch.cat([a, b], dim).to(output.dtype)


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
        return _reversible("ReversibleBlock", self._functions("ReversibleBlock: "), input, self.dim)

    def inverse(self, output: Tensor) -> Tensor:
        """The input that gives ``output``, for ``f`` and ``g`` without randomness. Running statistics stay as they are.

        Differentiable, as an ordinary function.
        """
        return _inverse("ReversibleBlock", self._functions("ReversibleBlock: "), output, self.dim)

    def _functions(self, prefix: str) -> list[tuple[str, nn.Module]]:
        return [(prefix + "f", self.f), (prefix + "g", self.g)]

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class ReversibleSequential(nn.Sequential):
    """A stack of blocks (:class:`ReversibleBlock`) that stores one activation, its output, whatever its depth.

    The backward pass rebuilds the input of each block from its output and costs one more forward pass: 4/3 of the time
    of a training step. Names in the state dict are those of ``nn.Sequential``: ``0.f.weight``.

    Each function runs twice, and the second run is like the first: the same random numbers (of torch's generators, CPU
    and the device of the input), train or eval mode, buffers and autocast; batch-norm statistics are updated once. So
    are other buffers that a function changes. Forward hooks of modules inside of f and g see both runs; hooks of
    parameters see one gradient, summed over the whole stack. Parameters may be frozen or shared between blocks.

    Halves are kept and added in float32, or float64 for float64 input; f and g see them in the dtype of the input,
    which is also that of the output. float16 and bfloat16 input thus keeps two float32 halves instead of one output.

    ``create_graph=True``, ``torch.func``, forward-mode derivatives and ``torch.export`` give the right result with
    ordinary graphs, which store activations; so does the call that initializes lazy modules. f and g may be compiled;
    ``torch.compile`` of a model around the stack breaks the graph here, to keep the memory flat, unless gradients are
    off.

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
        if not self.verify:
            return _reversible("ReversibleSequential", functions, input, dim)
        allowed = _TOLERANCES[_stream_dtype(input.dtype)] if self.verify is True else self.verify
        self.errors = {}
        return _reversible("ReversibleSequential", functions, input, dim, allowed, self.errors)

    def inverse(self, output: Tensor) -> Tensor:
        """The input that gives ``output``; see :meth:`ReversibleBlock.inverse`."""
        functions, dim = self._functions()
        return _inverse("ReversibleSequential", functions, output, dim) if functions else output

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
