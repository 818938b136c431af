"""Reversible stacks of functions, and the backward pass that rebuilds their activations.

One ``autograd.Function`` spans the whole stack. Its forward keeps the output and no other activation. Its backward
walks the functions f, g, f, g ... from the last to the first: it runs each one again, now with a graph, takes its
gradients, subtracts its value from the half it had been added to, and drops the graph. That the second run is like the
first is the work of :mod:`pyzoo.nn._replay`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pyzoo.nn._replay import Part, Replay, run, updates_statistics
from pyzoo.ops import _common as common
from pyzoo.ops.reversible import couple, reversible_reference, uncouple, uncouple_with_grad

_graph_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# What torch.autograd.grad calls after a look at its arguments, which takes as long as a small function does.
_run_backward = torch.autograd.Variable._execution_engine.run_backward


class _Call:
    """One call of a stack for which gradients may be wanted."""

    def __init__(
        self, functions: Sequence[tuple[str, nn.Module]], dim: int, dtype: torch.dtype, verify: float | None, errors
    ):
        self.replay = Replay(functions)
        self.dim, self.dtype, self.verify, self.errors = dim, dtype, verify, errors
        self.fingerprints: dict[str, Tensor] = {}
        self.parameters = list({id(p): p for part in self.replay.parts for p in part.trainable}.values())

    def forward(self, x: Tensor) -> Tensor:
        with self.replay.first_run(x) as run_first:

            def run_part(part: Part, a: Tensor, b: Tensor) -> Tensor:
                if self.verify is not None:
                    self.fingerprints[part.name] = _fingerprint(a)
                return run_first(part, b)

            return _couple_all(run_part, self.replay.parts, x, self.dim, self.dtype)

    def backward(self, y: Tensor, grad_y: Tensor, x_needs_grad: bool) -> tuple[Tensor | None, ...]:
        """The gradients of x and of the parameters."""
        # A function is differentiated beside the parameters' own hooks, which see the sum of all functions, once.
        stand_ins = {
            id(p): p.detach().requires_grad_() for p in self.parameters if p._backward_hooks or not p.requires_grad
        }
        grads: dict[int, Tensor] = {}
        # Halves and their gradients have no graph, so what is done to them below records none.
        a, b = y.detach().chunk(2, self.dim)
        grad_a, grad_b = grad_y.detach().chunk(2, self.dim)
        a, grad_b = _dense(a), _dense(grad_b)
        with self.replay.second_run(stand_ins) as run_again, torch.enable_grad():
            for k in reversed(range(len(self.replay.parts))):
                part = self.replay.parts[k]
                # a is what the function saw, b = (what is to be rebuilt) + function(a)
                seen = self._input(a).requires_grad_(k > 0 or x_needs_grad)
                trainable = [stand_ins.get(id(p), p) for p in part.trainable] if stand_ins else part.trainable
                update, grad_seen = self._differentiate(run_again, part, (*trainable, seen), grad_b, grads)
                del seen  # nobody else sees the halves any more
                if grad_seen is None:
                    b = uncouple(b, update)
                else:
                    b, grad_a = uncouple_with_grad(b, update, grad_a, grad_seen)
                del update, grad_seen
                if self.verify is not None:
                    self._verify(part, b)
                a, b, grad_a, grad_b = b, a, grad_b, grad_a
        grad_x = torch.cat([grad_a, grad_b], self.dim) if x_needs_grad else None
        return grad_x, *(grads.get(id(p)) for p in self.parameters)

    def _differentiate(
        self,
        run_again: Callable[[Part, Tensor], Tensor],
        part: Part,
        inputs: Sequence[Tensor],
        grad: Tensor,
        grads: dict[int, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """The function's value and the gradient of what it sees, the last of ``inputs``. Those of the parameters, the
        inputs before that, are added to ``grads``."""
        out = run_again(part, inputs[-1])
        if not inputs[-1].requires_grad:
            inputs = inputs[:-1]
        if not out.requires_grad:
            return out, None
        if part.module not in _graph_checked or self.verify is not None:
            _check_graph(part.name, out, inputs)
            _graph_checked.add(part.module)
        # Whoever keeps the very tensor given here, as hooks and biases do, keeps a view: it is not overwritten then.
        grad = grad.detach() if grad.dtype == out.dtype else grad.to(out.dtype)
        found = _run_backward((out,), (grad,), False, False, inputs, True, False) if inputs else ()
        for p, g in zip(part.trainable, found, strict=False):
            if g is not None:
                grads[id(p)] = grads[id(p)] + g if id(p) in grads else g
        grad_seen = found[-1] if len(found) > len(part.trainable) else None
        return out.detach(), None if grad_seen is None else grad_seen.detach()

    def backward_by_graph(self, y: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """The same by operators that record graphs and take batches of gradients: rebuilds x, then differentiates the
        ordinary forward pass.

        x depends on the parameters, too; stand-ins keep their gradients at constant x apart from that.
        """
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            a, b = y.chunk(2, self.dim)
            with self.replay.second_run({}) as run_again:
                for part in reversed(self.replay.parts):
                    a, b = b - run_again(part, a.to(self.dtype)), a
            x = torch.cat([a, b], self.dim)
            stand_ins = {id(p): p.view_as(p) for p in self.parameters}
            with self.replay.second_run(stand_ins) as run_again:
                functions = [lambda half, part=part: run_again(part, half.to(self.dtype)) for part in self.replay.parts]
                out = reversible_reference(functions, x, self.dim)
            inputs = [x, *stand_ins.values()]
            return torch.autograd.grad(out, inputs, grad_y, create_graph=create_graph, allow_unused=True)

    def _input(self, half: Tensor) -> Tensor:
        """A tensor of its own for the function, so that it shows when somebody keeps it."""
        return half.detach() if half.dtype == self.dtype else half.to(self.dtype)

    def _verify(self, part: Part, half: Tensor) -> None:
        error = _difference(_fingerprint(half), self.fingerprints[part.name])
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
        if torch.is_grad_enabled() or _is_batched(grad_y):
            return None, *ctx.call.backward_by_graph(y, grad_y)
        return None, *ctx.call.backward(y, grad_y, ctx.needs_input_grad[1])


def _is_batched(x: Tensor) -> bool:
    """By torch.vmap, or by ``is_grads_batched`` of torch.autograd.grad."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def _couple_all(
    run_part: Callable[[object, Tensor, Tensor], Tensor], parts: Sequence, x: Tensor, dim: int, dtype: torch.dtype
) -> Tensor:
    """The forward pass in place; ``run_part(part, a, b)`` returns what the function makes of b."""
    a, b = x.chunk(2, dim)
    b = _dense(b)
    for part in parts[:-1]:
        a, b = b, couple(a, run_part(part, a, b.detach() if b.dtype == dtype else b.to(dtype)))
    update = run_part(parts[-1], a, b.detach() if b.dtype == dtype else b.to(dtype))
    y = torch.empty_like(x)
    first, second = y.chunk(2, dim)
    first.copy_(b)
    couple(a, update, out=second)
    return y


def _dense(x: Tensor) -> Tensor:
    """``x``, or a copy if there are gaps in its memory, as in half of the channels of several images."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last or x.is_contiguous() else torch.empty_like(x).copy_(x)


def _check_graph(name: str, out: Tensor, known: Sequence[Tensor]) -> None:
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
                f"{name} uses a tensor of shape {list(leaf.shape)} that requires grad but is neither its input nor one "
                "of its parameters: its gradient would be lost"
            )
        nodes += [following for following, _ in node.next_functions]


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


# -------------------------------------------------------------------------------------------------------------- stacks


def stack_forward(
    functions: Sequence[tuple[str, nn.Module]],
    input: Tensor,
    dim: int,
    verify: float | None = None,
    errors: dict[str, float] | None = None,
) -> Tensor:
    """All functions on ``input``. ``verify`` is the difference that rebuilt halves may have; ``errors`` receives it."""
    graph_break = torch.compiler.is_compiling() and torch.is_grad_enabled() and not torch.compiler.is_exporting()
    forward = _forward_outside_graph if graph_break else _forward
    x = input.to(_stream_dtype(input.dtype))
    return forward(functions, x, dim, input.dtype, verify, errors).to(input.dtype)


def stack_inverse(functions: Sequence[tuple[str, nn.Module]], output: Tensor, dim: int) -> Tensor:
    norms = [m for _, function in functions for m in function.modules() if updates_statistics(m)]
    for m in norms:
        m.track_running_stats = False
    try:
        a, b = output.to(_stream_dtype(output.dtype)).chunk(2, dim)
        for name, function in reversed(functions):
            a, b = b - run(name, function, a.to(output.dtype)), a
    finally:
        for m in norms:
            m.track_running_stats = True
    return torch.cat([a, b], dim).to(output.dtype)


def _stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the halves. In 16 bits each block would lose what its update has beyond the last bit of the sum."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(
    functions: Sequence[tuple[str, nn.Module]],
    x: Tensor,
    dim: int,
    dtype: torch.dtype,
    verify: float | None,
    errors: dict[str, float] | None,
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
            return _couple_all(lambda function, _, b: run(*function, b), functions, x, dim, dtype)
        call = _Call(functions, dim, dtype, verify, errors)
        if (x.requires_grad or call.parameters) and not any(map(nn.parameter.is_lazy, call.parameters)):
            return _Reversible.apply(call, x, *call.parameters)
    return reversible_reference([lambda half, f=f: run(*f, half.to(dtype)) for f in functions], x, dim)


@torch._disable_dynamo
def _forward_outside_graph(*args) -> Tensor:
    return _forward(*args)
