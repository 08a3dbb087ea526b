import importlib
import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coopq.core.errors import BackendError, UnsupportedBits
from coopq.core.specs import QuantizerSpec
from coopq.core.types import Width
from coopq.quantizers import BACKENDS, get_backend
from coopq.quantizers.backend import AffineForm, Backend
from coopq.quantizers.contract import check_backend
from coopq.quantizers.rtn import RTNBackend, pack_bits, unpack_bits
from tests.quantizers import WEIGHT_ONLY, weight_quantizer
from tests.quantizers import backend as make

WIDTHS = [(name, bits) for name in WEIGHT_ONLY for bits in make(name).bits]


@pytest.mark.parametrize(("name", "bits"), WIDTHS)
@pytest.mark.parametrize("shape", [(64, 64), (64, 172), (192, 576), (64, 1536)])
def test_backends_keep_the_contract(name: str, bits: int, shape: tuple[int, int]) -> None:
    check_backend(make(name), torch.randn(shape) * torch.rand(shape[0], 1), bits)


def test_the_contract_covers_the_form_of_integers() -> None:
    class Wrong(RTNBackend):
        def affine_form(self, shape: tuple[int, int], bits: Width) -> AffineForm:
            return super().affine_form(shape, bits)._replace(zeros=torch.float16)

    with pytest.raises(AssertionError, match=r"torch\.float16"):
        check_backend(Wrong(), torch.randn(64, 64), 4)


@pytest.mark.parametrize(("name", "group_size"), [("rtn", 1), ("rtn", 48), ("rtn", 1000), ("hqq", 8), ("hqq", 128)])
def test_other_group_sizes_keep_the_contract(name: str, group_size: int) -> None:
    weight = torch.randn(64, 192)
    backend, shape = weight_quantizer(name, group_size=group_size), (64, 192)
    packed = backend.quantize(weight, 4)
    assert sum(tensor.nbytes for tensor in packed.values()) == backend.storage_bytes(shape, 4)
    restored = backend.dequantize(packed, shape, 4, weight.dtype)
    inputs = torch.randn(2, 192)
    torch.testing.assert_close(
        backend.linear(packed, shape, 4, None, weight.dtype)(inputs), inputs @ restored.T, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_16_bit_models_run_in_their_dtype(name: str, dtype: torch.dtype) -> None:
    backend, weight = weight_quantizer(name), torch.randn(128, 256).to(dtype)
    packed = backend.quantize(weight, 4)
    layer = backend.linear(packed, (128, 256), 4, None, dtype)
    inputs = torch.randn(2, 256, dtype=dtype)
    restored = backend.dequantize(packed, (128, 256), 4, dtype)
    assert restored.dtype == layer(inputs).dtype == dtype
    torch.testing.assert_close(layer(inputs), inputs @ restored.T, atol=0.15, rtol=0.02)
    assert sum(t.nbytes for t in packed.values()) == backend.storage_bytes((128, 256), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hqq_loses_no_precision_on_16_bit_models(dtype: torch.dtype) -> None:
    backend, weight = weight_quantizer("hqq"), (torch.randn(128, 256) / 50).bfloat16().float()
    for bits in backend.bits:
        exact, own = backend.quantize(weight, bits), backend.quantize(weight.to(dtype), bits)
        assert all(torch.equal(own[part], exact[part]) for part in exact)
        wanted = backend.dequantize(exact, (128, 256), bits, torch.float32).to(dtype)
        assert torch.equal(backend.dequantize(own, (128, 256), bits, dtype), wanted)


@given(bits=st.integers(1, 8), n=st.integers(1, 70), seed=st.integers(0, 1000))
def test_codes_survive_packing_without_gaps(bits: int, n: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, size=n, dtype=np.uint8))
    packed = pack_bits(codes, bits)
    assert packed.numel() == -(-n // 8) * bits
    assert torch.equal(unpack_bits(packed, bits, n), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rtn_by_its_definition(bits: int) -> None:
    backend, weight = weight_quantizer("rtn", group_size=8), torch.randn(5, 20)
    restored = backend.dequantize(backend.quantize(weight, bits), (5, 20), bits, torch.float32)
    for row in range(5):
        for start in range(0, 20, 8):
            group = weight[row, start : start + 8]
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
            zero = round(-low / scale)
            codes = [min(max(round(float(w) / scale) + zero, 0), 2**bits - 1) for w in group]
            expected = torch.tensor([(code - zero) * scale for code in codes])
            torch.testing.assert_close(restored[row, start : start + 8], expected, atol=1e-5, rtol=1e-5)


def test_rtn_keeps_zeros_and_constants() -> None:
    backend = weight_quantizer("rtn")
    for value in (0.0, 1e-9, 0.5, -0.5):
        weight = torch.full((2, 64), value)
        restored = backend.dequantize(backend.quantize(weight, 2), (2, 64), 2, torch.float32)
        torch.testing.assert_close(restored, weight, atol=1e-6, rtol=1e-3)


def test_an_unknown_backend_gets_a_hint() -> None:
    with pytest.raises(BackendError, match=r"'hqqq' is unknown; did you mean 'hqq'\?"):
        make("hqqq")


@pytest.mark.parametrize("name", BACKENDS)
def test_the_table_of_backends_says_what_classes_take(name: str) -> None:
    module, _, attribute = BACKENDS[name].path.partition(":")
    kind: type[Backend] = getattr(importlib.import_module(module), attribute)
    assert kind.name == name
    assert tuple(inspect.signature(kind).parameters) == BACKENDS[name].options


def test_the_table_of_backends_needs_no_torch() -> None:
    code = "import sys, coopq.quantizers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_width_that_the_library_lacks_is_refused() -> None:
    with pytest.raises(UnsupportedBits, match="'quanto' has no 3 bits; it has 2, 4, 8"):
        get_backend(QuantizerSpec("quanto"), (3, 4))


@pytest.mark.parametrize(("name", "group_size"), [("rtn", 0), ("hqq", -1), ("hqq", 4), ("quanto", 64)])
def test_group_sizes_are_checked(name: str, group_size: int) -> None:
    with pytest.raises(BackendError, match=r"group.size"):
        make(name, group_size=group_size)


def test_shapes_that_hqq_cannot_pack_are_refused_from_the_shape_alone() -> None:
    with pytest.raises(BackendError, match="cannot pack"):
        make("hqq").storage_bytes((3, 100), 4)


def test_a_failed_compilation_without_words_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum.quanto.library.extensions.cpp import ext

    def fail(_: object) -> None:
        raise ImportError

    monkeypatch.setattr(type(ext), "lib", property(fail))
    with pytest.raises(BackendError, match=r"could not compile its CPU kernels \(ImportError\)"):
        make("quanto")


def test_a_lock_of_a_killed_compilation_stops_nobody() -> None:
    """torch waits for ever for a file that only its maker removes."""
    code = (
        "from pathlib import Path; from optimum.quanto.library.extensions.cpp import ext; "
        "from coopq.quantizers.quanto import QuantoBackend; (Path(ext.build_directory) / 'lock').touch(); "
        "QuantoBackend()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
