"""Gram loss: samples, errors and benchmark cases, on the feature maps of the Gram matrix."""

from __future__ import annotations

import torch

import pyzoo.ops
from tests.specs import gram_matrix, inputs
from tests.specs.spec import ErrorSample, OpSpec, Sample


def peer(features, target, *, normalize=True):
    gram = gram_matrix.peer(features, normalize=normalize)
    return torch.nn.functional.mse_loss(gram, target.expand_as(gram))


def target_of(features, *batch, seed=5, dtype=None):
    channels = features.shape[1]
    return inputs.features(*batch, channels, channels, seed=seed).to(dtype or features.dtype)


def samples(dtype, memory_format):
    for id, x, has_peer in gram_matrix.feature_maps(dtype, memory_format):
        yield Sample(id, (x, target_of(x, x.shape[0])), peer=has_peer and id != "no_images")
        if id not in ("random", "channels_33", "channels_130"):
            continue
        normalized = pyzoo.ops.gram_matrix_reference(x)
        yield Sample(f"{id}_not_normalized", (x, target_of(x, x.shape[0])), {"normalize": False})
        yield Sample(f"{id}_near", (x, normalized + target_of(x, x.shape[0]) / 8))
        yield Sample(f"{id}_zero", (x, torch.zeros_like(normalized)))
        yield Sample(f"{id}_one_target", (x, target_of(x)))
        yield Sample(f"{id}_one_target_batched", (x, target_of(x, 1)))
        yield Sample(f"{id}_target_transposed", (x, target_of(x, x.shape[0]).transpose(1, 2)))
        yield Sample(f"{id}_target_expanded", (x, target_of(x)[:1].expand(x.shape[1], -1)))
        for other in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            yield Sample(f"{id}_target_{other}".replace("torch.", ""), (x, target_of(x, dtype=other)), peer=False)
    x = inputs.features(2, 5, 13, 17, dtype=dtype, memory_format=memory_format)
    target = target_of(x, 2)
    target[1, 2, 3] = inputs.NAN
    yield Sample("nan_target", (x, target))


def errors():
    x = torch.zeros(2, 3, 8, 8)
    for id, features, error, match in gram_matrix.FEATURE_ERRORS:
        yield ErrorSample(id, (features, torch.zeros(2, 3, 3)), error=error, match=f"^gram_loss: .*{match}")
    shape = r"^gram_loss: target must have shape \[2, 3, 3\], \[1, 3, 3\] or \[3, 3\] for features \[2, 3, 8, 8\], got "
    yield ErrorSample("target_channels", (x, torch.zeros(2, 4, 4)), match=rf"{shape}\[2, 4, 4\]")
    yield ErrorSample("target_not_square", (x, torch.zeros(2, 3, 1)), match=rf"{shape}\[2, 3, 1\]")
    yield ErrorSample("target_batch", (x, torch.zeros(4, 3, 3)), match=rf"{shape}\[4, 3, 3\]")
    yield ErrorSample("target_rank", (x, torch.zeros(1, 2, 3, 3)), match=rf"{shape}\[1, 2, 3, 3\]")
    yield ErrorSample("target_number", (x, torch.zeros(())), match=rf"{shape}\[\]")
    yield ErrorSample(
        "target_integer",
        (x, torch.zeros(3, 3).int()),
        error=TypeError,
        match="^gram_loss: target must be float32.*int32",
    )
    yield ErrorSample(
        "target_type", (x, 0.0), error=TypeError, match="^gram_loss: target must be a torch.Tensor, got float"
    )
    yield ErrorSample(
        "target_device",
        (x, torch.zeros(3, 3, device="meta")),
        match="^gram_loss: target and features must be on one device",
    )
    yield ErrorSample(
        "target_sparse", (x, torch.zeros(3, 3).to_sparse()), error=TypeError, match="^gram_loss: .*must be dense"
    )


def small(dtype, memory_format):
    features = gram_matrix.small_features(dtype, memory_format)
    return pyzoo.ops.gram_loss, (features, target_of(features, 2))


def export(tensors):
    dynamic, other = gram_matrix.export_features(tensors[0])
    return (dynamic, None), [other, tensors[1]]


def huge(sparse, memory_format):
    far, near = gram_matrix.huge_features(sparse, memory_format)
    return pyzoo.ops.gram_loss(far, target_of(near)), pyzoo.ops.gram_loss(near, target_of(near))


SPEC = OpSpec(
    name="gram_loss",
    op=pyzoo.ops.gram_loss,
    reference=pyzoo.ops.gram_loss_reference,
    samples=samples,
    errors=errors,
    bench=lambda: gram_matrix.bench_cases(lambda features: (features, target_of(features, features.shape[0]))),
    peer=peer,
    peer_name="torch.bmm, F.mse_loss",
    differentiable=(0,),
    wide_output=True,
    # As for the Gram matrix; squares double the relative errors, and all of half precision is in the features.
    tolerances={
        torch.float32: (2e-5, 2e-6),
        torch.float64: (1e-13, 1e-14),
        torch.float16: (1e-3, 1e-4),
        torch.bfloat16: (8e-3, 1e-3),
    },
    tensors=2,
    small=small,
    export=export,
    huge=huge,
)
