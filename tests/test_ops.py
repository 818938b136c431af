"""One battery over all specs, dtypes and layouts. A test marked with a capability fills that column of
docs/conformance.md.

``PYZOO_TEST_DEVICE=cuda`` runs it on a GPU, ``PYZOO_BACKEND`` chooses the kernels. The references stay on the CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import pyzoo
from pyzoo._backend import runs_on_core
from pyzoo.ops._common import operators
from tests.specs import (
    batch_norm_act,
    batched_nms,
    depthwise_conv2d,
    gram_loss,
    gram_matrix,
    inputs,
    masked_conv2d,
    multiscale_roi_align,
    nms,
    roi_align,
    roi_pool,
    spatial_pyramid_pool2d,
)
from tests.specs.spec import OpSpec, Sample

SPECS = [
    module.SPEC
    for module in (
        roi_align,
        multiscale_roi_align,
        roi_pool,
        nms,
        batched_nms,
        masked_conv2d,
        gram_matrix,
        gram_loss,
        spatial_pyramid_pool2d,
        depthwise_conv2d,
        batch_norm_act,
    )
]
DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]
POOLING = [module.SPEC for module in (roi_align, multiscale_roi_align, roi_pool)]
BOX_OPS = [nms.SPEC, batched_nms.SPEC]

DEVICE = os.environ.get("PYZOO_TEST_DEVICE", "cpu")
if DEVICE != "cpu":  # not TF32, whose rounding is not that of a reference
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"
cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="on the CPU alone")


@dataclass(frozen=True)
class Layout:
    name: str
    memory_format: torch.memory_format


def layouts(spec: OpSpec) -> list[Layout]:
    formats = (torch.contiguous_format, torch.channels_last)
    return [Layout(name, format) for name, format in zip(spec.layouts, formats, strict=True)]


def name(value) -> str:
    return str(getattr(value, "name", value)).removeprefix("torch.")


def each_cell(specs=SPECS, dtypes=None):
    cells = [(s, dtype, layout) for s in specs for dtype in dtypes or s.dtypes for layout in layouts(s)]
    return pytest.mark.parametrize(
        ("spec", "dtype", "layout"), cells, ids=["-".join(map(name, cell)) for cell in cells]
    )


def capability(name: str):
    return pytest.mark.capability(name)


def samples(spec: OpSpec, dtype, layout, *, only=lambda sample: True) -> list[Sample]:
    found = [sample for sample in spec.samples(dtype, layout.memory_format) if only(sample)]
    assert found
    return [replace(s, args=on_device(s.args), kwargs=on_device(s.kwargs)) for s in found] if DEVICE != "cpu" else found


def on_device(tree, device=DEVICE):
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, tree)


def typical(spec: OpSpec, dtype, layout) -> Sample:
    return samples(spec, dtype, layout, only=lambda sample: spec.typical in ("", sample.id))[0]


def widen(tree):
    """Half precision to float32: exact, and what the kernels compute in."""
    half = (torch.float16, torch.bfloat16)
    return tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype in half else x, tree)


_expected = {}


def expected_of(spec: OpSpec, dtype, sample: Sample):
    """The reference's answer, which is the same for each layout and instruction set."""
    key = (spec.name, dtype, sample.id)
    if key not in _expected:
        wide = widened(spec, sample)
        _expected[key] = spec.reference(*wide.args, **wide.kwargs)
    return _expected[key]


def check(spec: OpSpec, actual, expected, what=""):
    """Equal, or within the tolerance of the dtype, where the absolute one counts in units of the largest expected
    value."""
    actual, expected = tree_flatten(actual)[0], tree_flatten(expected)[0]
    assert len(actual) == len(expected), what
    for got, want in zip(actual, expected, strict=True):
        if spec.exact or not got.is_floating_point():
            rtol, atol = 0, 0
        else:
            rtol, atol = spec.tolerances[got.dtype]
            finite = want[want.isfinite()].abs()
            atol *= max(1.0, finite.max().item() if finite.numel() else 0.0)
        torch.testing.assert_close(
            got,
            want.to(got),
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda m: f"{what}\n{m}",
        )


def with_grad(spec: OpSpec, args):
    """The arguments with leaves in the differentiable places, and the leaves."""
    leaves = []

    def leaf(x):
        if x is None:
            return None
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    return [tree_map(leaf, arg) if i in spec.differentiable else arg for i, arg in enumerate(args)], leaves


def random_like(x, seed=7):
    values = torch.randn(x.shape, generator=inputs.generator(seed), dtype=torch.float64)
    return torch.empty_like(x).copy_(values)


def gradients(op, spec, sample, *, grad_output=None, create_graph=False):
    args, leaves = with_grad(spec, sample.args)
    out = op(*args, **sample.kwargs)
    grad_output = random_like(out.detach()) if grad_output is None else grad_output(out)
    return out, torch.autograd.grad(out, leaves, grad_output.to(out.dtype), create_graph=create_graph)


def expected_gradients_of(spec: OpSpec, dtype, sample: Sample):
    """The same for the gradients that :func:`gradients` takes."""
    key = (spec.name, dtype, sample.id, "gradients")
    if key not in _expected:
        grad_output = random_like(spec.op(*sample.args, **sample.kwargs).detach()).cpu()
        _expected[key] = gradients(spec.reference, spec, widened(spec, sample), grad_output=lambda _: grad_output)[1]
    return _expected[key]


def widened(spec: OpSpec, sample: Sample) -> Sample:
    args = [widen(arg) if i in spec.differentiable else arg for i, arg in enumerate(sample.args)]
    return Sample(sample.id, on_device(tuple(args), "cpu"), on_device(sample.kwargs, "cpu"))


def finite(sample: Sample) -> bool:
    tensors = [x for x in tree_flatten(sample.args[0])[0] if isinstance(x, torch.Tensor)]
    return all(x.isfinite().all() for x in tensors)


# -------------------------------------------------------------------------------------------------------------- values


@capability("forward")
@each_cell()
def test_forward_matches_reference(spec, dtype, layout, poison):
    for sample in samples(spec, dtype, layout):
        check(spec, spec.op(*sample.args, **sample.kwargs), expected_of(spec, dtype, sample), sample.id)


@cpu_only
@capability("forward")
@each_cell(dtypes=(torch.float32, torch.float64))
def test_forward_matches_peer(spec, dtype, layout):
    pytest.importorskip("torchvision")
    for sample in samples(spec, dtype, layout, only=lambda sample: sample.peer):
        check(spec, spec.op(*sample.args, **sample.kwargs), spec.peer(*sample.args, **sample.kwargs), sample.id)


@capability("forward")
@each_cell(DIFFERENTIABLE)
def test_output_keeps_dtype_and_layout(spec, dtype, layout):
    sample = typical(spec, dtype, layout)
    out, grads = gradients(spec.op, spec, sample)
    _, leaves = with_grad(spec, sample.args)
    assert out.dtype == (widen(leaves[0]) if spec.wide_output else leaves[0]).dtype
    if out.dim() == 4:
        assert out.is_contiguous(memory_format=layout.memory_format)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.stride() == torch.empty_like(leaf).stride()


@capability("backward")
@each_cell(DIFFERENTIABLE)
def test_backward_matches_reference(spec, dtype, layout, poison):
    for sample in samples(spec, dtype, layout, only=finite):
        _, actual = gradients(spec.op, spec, sample)
        check(spec, actual, expected_gradients_of(spec, dtype, sample), sample.id)


@capability("backward")
@each_cell(DIFFERENTIABLE)
def test_backward_takes_gradients_of_any_strides(spec, dtype, layout):
    sample = typical(spec, dtype, layout)
    for make in (
        lambda out: torch.ones((), dtype=out.dtype).expand_as(out),
        lambda out: random_like(torch.stack([out, out], -1))[..., 1],
        lambda out: random_like(out.flatten(0, -2).t()).t().view_as(out) if out.dim() > 1 else random_like(out),
        lambda out: random_like(out.narrow(-1, 0, 1)).expand_as(out) if out.dim() > 1 else random_like(out),
        lambda out: random_like(out[:, :1]).expand_as(out) if out.dim() > 1 else random_like(out),
    ):
        _, actual = gradients(spec.op, spec, sample, grad_output=make)
        _, expected = gradients(spec.op, spec, sample, grad_output=lambda out, make=make: make(out).contiguous())
        check(spec, actual, expected)


@capability("double backward")
@each_cell(DIFFERENTIABLE)
def test_double_backward_matches_reference(spec, dtype, layout):
    sample = typical(spec, dtype, layout)
    grad_output = random_like(spec.op(*sample.args, **sample.kwargs))

    def double_backward(op, sample):
        args, leaves = with_grad(spec, sample.args)
        leaves.append(grad_output.detach().to(leaves[0].device).requires_grad_())
        out = op(*args, **sample.kwargs)
        grads = torch.autograd.grad(out, leaves[:-1], leaves[-1].to(out.dtype), create_graph=True)
        directions = [random_like(g, seed=i).to(dtype).to(g.dtype) for i, g in enumerate(grads)]
        return torch.autograd.grad(grads, leaves, directions, materialize_grads=True)

    check(spec, double_backward(spec.op, sample), double_backward(spec.reference, widened(spec, sample)))


@cpu_only
@pytest.mark.parametrize("isa", pytest.importorskip("pyzoo._C").build_info()["isas"])
@each_cell(dtypes=(torch.float32, torch.bfloat16))
def test_each_instruction_set(spec, dtype, layout, isa, set_isa):
    set_isa(isa)
    for sample in samples(spec, dtype, layout)[:40]:
        check(spec, spec.op(*sample.args, **sample.kwargs), expected_of(spec, dtype, sample), sample.id)


@cpu_only
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_threads_give_the_same_bits(spec, set_threads):
    """On an input large enough that the work is shared out."""
    case = min(
        (c for c in spec.bench() if c.backward == bool(spec.differentiable) and c.floor_bytes > 1e5),
        key=lambda c: c.floor_flops,
    )
    args, kwargs = case.make()
    results = []
    for threads in (1, 2, 4):
        set_threads(threads)
        sample = Sample(case.id, args, kwargs)
        results.append(gradients(spec.op, spec, sample) if spec.differentiable else spec.op(*args, **kwargs))
    for result in results[1:]:
        for got, want in zip(tree_flatten(result)[0], tree_flatten(results[0])[0], strict=True):
            assert torch.equal(got, want)


# ---------------------------------------------------------------------------------------------------------- degenerate


@capability("empty")
@each_cell()
def test_empty(spec, dtype, layout, poison):
    empty = ("no_", "clustered_0", "0_boxes", "batch_of_none")
    for sample in samples(spec, dtype, layout, only=lambda s: s.id.startswith(empty)):
        if not spec.differentiable:
            check(spec, spec.op(*sample.args, **sample.kwargs), expected_of(spec, dtype, sample), sample.id)
            continue
        out, grads = gradients(spec.op, spec, sample)
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in grads)
        if out.numel() == 0:
            assert not any(g.any() for g in grads)


@capability("NaN")
@each_cell()
def test_not_finite(spec, dtype, layout, poison):
    """Boxes with a coordinate that is not finite pool to zero and get no gradient; nms treats them as torchvision
    does."""
    words = ("not_finite", "nan", "inf", "huge")
    for sample in samples(spec, dtype, layout, only=lambda s: any(word in s.id for word in words)):
        out = spec.op(*sample.args, **sample.kwargs)
        check(spec, out, expected_of(spec, dtype, sample), sample.id)
        if "not_finite" in sample.id and spec in POOLING:
            boxes = torch.cat(sample.args[1]) if isinstance(sample.args[1], list) else sample.args[1]
            bad = ~boxes.isfinite().all(1)
            assert bad.any()
            assert not out[bad].any()
            args, leaves = with_grad(spec, sample.args)
            spec.op(*args, **sample.kwargs)[bad].sum().backward()
            assert not any(leaf.grad.any() for leaf in leaves)


@cpu_only
@capability("> 2^31 elements")
@each_cell()
def test_more_than_int32_elements(spec, dtype, layout, tmp_path):
    """Offsets beyond 2^31, in a sparse file, so that neither memory nor disk is used for what is not touched."""

    def sparse(count):
        return torch.from_file(str(tmp_path / "sparse"), shared=True, size=count, dtype=dtype)

    if spec.huge is None:
        pytest.skip("needs no address arithmetic that long")
    actual, expected = spec.huge(sparse, layout.memory_format)
    # Coordinates of 7000 have fewer bits behind the point.
    tolerance = 0 if spec.exact else 2e-2 if dtype != torch.float64 else 1e-9
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


ERRORS = [(spec, error) for spec in SPECS for error in spec.errors()]


@cpu_only
@pytest.mark.parametrize(("spec", "error"), ERRORS, ids=[f"{spec.name}-{error.id}" for spec, error in ERRORS])
def test_errors(spec, error):
    if error.id.startswith("index_") and not runs_on_core(torch.device("cpu")):
        pytest.skip("a kernel on a GPU cannot raise")
    with pytest.raises(error.error, match=error.match):
        spec.op(*error.args, **error.kwargs)


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=name)
def test_lazily_negated_view(spec):
    sample = typical(spec, torch.float32, layouts(spec)[0])
    negated = tree_map(lambda x: torch._neg_view(x), sample.args[0])
    plain = tree_map(lambda x: -x, sample.args[0])
    check(spec, spec.op(negated, *sample.args[1:], **sample.kwargs), spec.op(plain, *sample.args[1:], **sample.kwargs))


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_meta_tensors(spec):
    sample = typical(spec, torch.float32, layouts(spec)[0])
    kwargs = {**sample.kwargs, **spec.static}
    meta = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, sample.args)
    want = spec.op(*sample.args, **kwargs)
    for got, like in zip(tree_flatten(spec.op(*meta, **kwargs))[0], tree_flatten(want)[0], strict=True):
        assert got.device.type == "meta"
        assert (got.shape, got.dtype, got.stride()) == (like.shape, like.dtype, like.stride())


# ---------------------------------------------------------------------------------------------------------- transforms


def small(spec: OpSpec, dtype=torch.float64, layout=None) -> tuple:
    return spec.small(dtype, layout.memory_format if layout else torch.contiguous_format)


@cpu_only
@capability("backward")
@each_cell(DIFFERENTIABLE, (torch.float64,))
def test_gradcheck(spec, dtype, layout):
    f, xs = small(spec, dtype, layout)
    # Batched by the old vmap, which has no rules, and no fallback for an operator that returns a list.
    batched = spec is not multiscale_roi_align.SPEC
    leaves = [x.requires_grad_() for x in xs]
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=batched)


@cpu_only
@capability("double backward")
@each_cell(DIFFERENTIABLE, (torch.float64,))
def test_gradgradcheck(spec, dtype, layout):
    f, xs = small(spec, dtype, layout)
    assert torch.autograd.gradgradcheck(f, [x.requires_grad_() for x in xs], check_fwd_over_rev=True)


def stacked(tree, dim=0):
    """Two variants of each tensor along a new dimension, and the variants: themselves, and with one dimension
    reversed."""
    tensors, spec = tree_flatten(tree)
    others = [x.flip(0) if x.dim() < 4 else x.flip(3) for x in tensors]
    both = [torch.stack(pair, dim) for pair in zip(tensors, others, strict=True)]
    return tree_unflatten(both, spec), [tree, tree_unflatten(others, spec)]


@capability("vmap")
@each_cell()
def test_vmap(spec, dtype, layout):
    sample = typical(spec, dtype, layout)
    count = spec.tensors
    tensors, rest = list(sample.args[:count]), sample.args[count:]
    kwargs = {**sample.kwargs, **spec.static}

    def call(*tensors):
        return spec.op(*tensors, *rest, **kwargs)

    for which in product((False, True), repeat=count):
        if not any(which):
            continue
        dims = [1 if batched and i == 0 and spec.differentiable else 0 for i, batched in enumerate(which)]
        pairs = [stacked(t, d) if batched else (t, [t, t]) for t, batched, d in zip(tensors, which, dims, strict=True)]
        in_dims = tuple(d if batched else None for d, batched in zip(dims, which, strict=True))
        actual = torch.vmap(call, in_dims)(*[pair[0] for pair in pairs])
        separate = [call(*[pair[1][i] for pair in pairs]) for i in range(2)]
        expected = tree_map(lambda *both: torch.stack(both), *separate)
        check(spec, actual, expected, f"batched: {which}")
    twice = tree_map(lambda x: torch.stack([x, x]), stacked(tensors[0])[0])
    nested = torch.vmap(torch.vmap(call, (0, *[None] * (count - 1))), (0, *[None] * (count - 1)))(twice, *tensors[1:])
    once = torch.vmap(call, (0, *[None] * (count - 1)))(stacked(tensors[0])[0], *tensors[1:])
    check(spec, nested, tree_map(lambda x: torch.stack([x, x]), once), "nested")


@pytest.mark.parametrize("spec", BOX_OPS, ids=name)
def test_vmap_needs_static_shapes(spec):
    sample = typical(spec, torch.float32, layouts(spec)[0])
    with pytest.raises(RuntimeError, match="under vmap give max_output=k"):
        torch.vmap(lambda boxes: spec.op(boxes, *sample.args[1:]))(torch.stack([sample.args[0]] * 2))


@cpu_only
@pytest.mark.skipif(not runs_on_core(torch.device("cpu")), reason="a kernel on a GPU cannot raise")
def test_vmap_does_not_reach_into_other_images():
    x, boxes = torch.rand(2, 1, 3, 8, 8), torch.tensor([[[0.0, 0, 0, 4, 4]], [[1.0, 0, 0, 4, 4]]])
    for shift in (0.0, -1.0, 1.0):
        with pytest.raises(ValueError, match="batch index must be in"):
            torch.vmap(lambda x, b: pyzoo.ops.roi_align(x, b, 2))(x, boxes + torch.tensor([shift, 0, 0, 0, 0]))


@cpu_only
@capability("func")
@each_cell(DIFFERENTIABLE)
def test_func(spec, dtype, layout):
    f, xs = small(spec, dtype, layout)
    every = tuple(range(len(xs)))

    def loss(*xs):
        return (f(*xs) ** 2).sum()

    leaves = [x.clone().requires_grad_() for x in xs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    check(spec, torch.func.grad(loss, every)(*xs), expected)
    batch = [torch.stack([x, -x, 2 * x]) for x in xs]
    each = [torch.func.grad(loss, every)(*entry) for entry in zip(*batch, strict=True)]
    per_entry = torch.func.vmap(torch.func.grad(loss, every))(*batch)
    check(spec, per_entry, tuple(torch.stack(gs) for gs in zip(*each, strict=True)))
    check(spec, torch.func.grad(lambda *batch: torch.func.vmap(loss)(*batch).sum(), every)(*batch), per_entry)
    check(spec, torch.func.jacrev(f, every)(*xs), torch.func.jacfwd(f, every)(*xs))
    tangents = tuple(random_like(x) for x in xs)
    check(spec, torch.func.jvp(f, xs, tangents)[1], torch.autograd.functional.jvp(f, xs, tangents)[1])
    check(spec, torch.func.functionalize(f)(*xs), f(*xs))


@cpu_only
@capability("func")
@each_cell(DIFFERENTIABLE, (torch.float64,))
def test_func_second_derivatives(spec, dtype, layout):
    f, xs = small(spec, dtype, layout)
    every = tuple(range(len(xs)))

    def loss(*xs):
        return (f(*xs) ** 3).sum()

    hessian = torch.func.hessian(loss, every)(*xs)
    check(spec, torch.func.jacrev(torch.func.jacrev(loss, every), every)(*xs), hessian)
    check(spec, hessian, torch.autograd.functional.hessian(loss, xs))


@capability("func")
@each_cell(BOX_OPS)
def test_func_without_gradient(spec, dtype, layout):
    """Suppression inside of a function that is differentiated."""
    sample = typical(spec, dtype, layout)

    def loss(boxes):
        return boxes[spec.op(boxes, *sample.args[1:])].square().sum()

    leaf = sample.args[0].clone().requires_grad_()
    check(spec, torch.func.grad(loss)(sample.args[0]), torch.autograd.grad(loss(leaf), leaf)[0])


@capability("autocast")
@each_cell()
def test_autocast(spec, dtype, layout):
    """As if the tensors had been cast before, or as if it were not there."""
    sample = typical(spec, dtype, layout)

    def run(sample):
        return gradients(spec.op, spec, sample) if spec.differentiable else spec.op(*sample.args)

    for low in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype=low):
            actual = run(sample)
        if spec.autocast and dtype != torch.float64:
            out, grads = run(Sample(sample.id, tuple(_to(low, arg) for arg in sample.args), sample.kwargs))
            expected = out, _to(dtype, grads)
        else:
            expected = run(sample)
        for got, want in zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True):
            assert torch.equal(got, want)
            assert got.dtype == want.dtype


def _to(dtype, tree):
    return tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree)


@capability("deterministic")
@each_cell()
def test_deterministic(spec, dtype, layout, poison):
    sample = typical(spec, dtype, layout)
    runs = [gradients(spec.op, spec, sample) if spec.differentiable else spec.op(*sample.args) for _ in range(3)]
    for run in runs[1:]:
        for got, want in zip(tree_flatten(run)[0], tree_flatten(runs[0])[0], strict=True):
            assert torch.equal(got, want)


# ------------------------------------------------------------------------------------------------------------ compilers


@capability("compile")
@each_cell()
def test_compile(spec, dtype, layout):
    torch._dynamo.reset()
    sample = typical(spec, dtype, layout)
    backend = "inductor" if dtype == torch.float32 else "aot_eager"
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(spec.op, fullgraph=True, backend=backend)
        if spec.differentiable:
            check(spec, gradients(compiled, spec, sample), gradients(spec.op, spec, sample))
        for kwargs in {} if spec.static else sample.kwargs, {**sample.kwargs, **spec.static}:
            with torch.no_grad():
                check(spec, compiled(*sample.args, **kwargs), spec.op(*sample.args, **kwargs))


@cpu_only
@capability("compile")
@each_cell(DIFFERENTIABLE, (torch.float64,))
def test_compile_of_transforms(spec, dtype, layout):
    torch._dynamo.reset()
    f, xs = small(spec, dtype, layout)

    def per_example_grad(*batch):
        return torch.func.vmap(torch.func.grad(lambda *xs: (f(*xs) ** 2).sum()))(*batch)

    batch = [torch.stack([x, -x]) for x in xs]
    check(spec, torch.compile(per_example_grad, fullgraph=True, backend="aot_eager")(*batch), per_example_grad(*batch))


class Call(torch.nn.Module):
    def __init__(self, op, rest, kwargs):
        super().__init__()
        self.op, self.rest, self.kwargs = op, rest, kwargs

    def forward(self, *tensors):
        return self.op(*tensors, *self.rest, **self.kwargs)


@capability("export")
@each_cell()
def test_export_with_dynamic_shapes(spec, dtype, layout):
    sample = typical(spec, dtype, layout)
    tensors, rest = list(sample.args[: spec.tensors]), sample.args[spec.tensors :]
    dynamic, other = spec.export(tensors)
    for kwargs in [sample.kwargs, spec.static] if spec.static else [sample.kwargs]:
        call = Call(spec.op, rest, kwargs)
        program = torch.export.export(call, tuple(tensors), dynamic_shapes={"tensors": dynamic})
        for args in (tensors, other):
            check(spec, program.module()(*args), call(*args))


class RecordOps(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyzoo":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@capability("opcheck")
@each_cell()
def test_opcheck(spec, dtype, layout):
    """Of every operator that a call and its first and second derivative run."""
    sample = typical(spec, dtype, layout)
    with RecordOps() as record:
        if spec.differentiable:
            args, leaves = with_grad(spec, sample.args)
            out = spec.op(*args, **sample.kwargs)
            leaves.append(random_like(out.detach()).requires_grad_())
            grads = torch.autograd.grad(out, leaves[:-1], leaves[-1], create_graph=True)
            directions = [random_like(g.detach()) for g in grads]
            torch.autograd.grad(grads, leaves, directions, allow_unused=True)
        else:
            spec.op(*sample.args)
            spec.op(*sample.args, **spec.static)
    seen = {}
    for op, args, kwargs in record.calls:
        seen.setdefault(op, (args, kwargs))
    assert len(seen) >= 2
    for op, (args, kwargs) in seen.items():
        fresh = tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, args)
        torch.library.opcheck(op, fresh, kwargs)
        operator = operators[op._schema.name.partition("::")[2]]
        if spec.differentiable:
            args = [
                tree_map(lambda x: None if x is None else x.requires_grad_(), x) if i in operator.differentiable else x
                for i, x in enumerate(fresh)
            ]
            torch.library.opcheck(op, tuple(args), kwargs)
