"""The contract of a backend as a check, for coopq's tests and for tests of plugins."""

import torch
from torch.nn import functional

from coopq.core.types import Width
from coopq.quantizers.backend import Backend, Packed, WeightQuantizer


def check_backend(backend: Backend, weight: torch.Tensor, bits: Width, most_steps: float = 1.0) -> None:
    """Check that sizes are as predicted, and that layer and integers are those of the weight that the bank holds.

    Args:
        backend: A backend that quantizes one weight at a time.
        weight: A weight of shape (out, in), float32.
        bits: One of the backend's widths.
        most_steps: How far a weight may move, in steps of an even grid of 2**bits levels.
    Raises:
        AssertionError: If a promise of `coopq.quantizers.backend.Backend` is broken.
    """
    assert isinstance(backend, WeightQuantizer), f"backend {backend.name!r} does not quantize single weights"
    shape = (weight.shape[0], weight.shape[1])
    packed = backend.quantize(weight, bits)
    n_bytes = sum(tensor.nbytes for tensor in packed.values())
    assert n_bytes == backend.storage_bytes(shape, bits), (n_bytes, backend.storage_bytes(shape, bits))
    assert n_bytes * 8 < (bits + 2.1) * weight.numel(), "weights must be packed"
    restored = backend.dequantize(packed, shape, bits, weight.dtype)
    assert restored.shape == weight.shape
    assert restored.dtype == weight.dtype
    again = backend.dequantize(backend.quantize(weight, bits), shape, bits, weight.dtype)
    assert torch.equal(restored, again), "quantizing twice must give the same weights"
    spread = float(weight.max() - weight.min())
    step = spread / (2**bits - 1)
    assert float((restored - weight).abs().max()) <= most_steps * step, "no weight may move by more than a step"
    inputs, bias = torch.randn(3, shape[1], dtype=weight.dtype), torch.randn(shape[0], dtype=weight.dtype)
    layer = backend.linear(packed, shape, bits, bias, weight.dtype)
    assert torch.allclose(layer(inputs), functional.linear(inputs, restored, bias), atol=1e-4)
    assert layer.weight.shape == weight.shape, "some models look at the weight of a layer"
    if backend.is_affine and shape[1] % backend.affine_form(shape, bits).group_size == 0:
        _check_affine(backend, packed, restored, bits, 1e-3 * step)


def _check_affine(backend: Backend, packed: Packed, restored: torch.Tensor, bits: Width, tolerance: float) -> None:
    """Check that integers in groups are the weight, and of the form that its shape alone tells."""
    shape = (restored.shape[0], restored.shape[1])
    form, affine = backend.affine_form(shape, bits), backend.affine(packed, shape, bits)
    n_groups = shape[1] // form.group_size
    assert affine.codes.shape == (shape[0], n_groups, form.group_size)
    assert affine.zeros.shape == affine.scales.shape == (shape[0], n_groups, 1)
    assert affine.codes.dtype == torch.uint8
    assert int(affine.codes.max()) < 2**bits
    assert affine.scales.dtype.itemsize == 2
    assert affine.zeros.dtype == form.zeros, (affine.zeros.dtype, form.zeros)
    assert not form.symmetric or bool((affine.zeros == 2 ** (bits - 1)).all()), "zero points must be in the middle"
    weight = ((affine.codes.float() - affine.zeros.float()) * affine.scales.float()).reshape(shape)
    assert float((weight - restored).abs().max()) <= tolerance, "the integers must be those of the weight"
