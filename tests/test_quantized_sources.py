"""Sources that are quantized: FP8 and MXFP4 become bfloat16, and all others are refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from coopq.core.errors import ModelError
from coopq.model.load import checkpoint_dtype, load_model, load_skeleton
from coopq.model.sources.scaled import dequantize_fp8, dequantize_mxfp4
from tests.folders import TENSORS, change_config, change_tensors, refusal, save_llama, save_source, settings


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama with a head of its own."""
    return save_llama(tmp_path / "llama")


@pytest.mark.parametrize(
    "name", ["weight_scale", "weight_scale_inv", "qweight", "qzeros", "g_idx", "weight.absmax", "SCB", "input_scale"]
)
def test_scales_without_a_method_are_refused(llama: Path, name: str) -> None:
    stored = f"model.layers.0.mlp.down_proj.{name}"
    change_tensors(llama, lambda tensors: tensors.update({stored: torch.ones(4)}))
    assert stored in refusal(llama)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_quantized_dtypes_without_a_method_are_refused(llama: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(llama, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert name in refusal(llama)
    with pytest.raises(ModelError, match="quantized weights"):
        load_skeleton(str(llama), device="cpu")


def in_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A weight in FP8 with a scale for each block, and the scales."""
    rows, columns = (-(-size // each) for size, each in zip(weight.shape, block, strict=True))
    scale = torch.rand(rows, columns) + 0.5
    grown = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: weight.shape[0], : weight.shape[1]]
    return (weight / grown).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("kind", ["fp8", "compressed-tensors", "fbgemm_fp8", "modelopt"])
def test_fp8_weights_become_bfloat16(llama: Path, kind: str) -> None:
    name = "model.layers.0.mlp.down_proj.weight"  # 32 rows of 48: no multiple of a block
    expected: TENSORS = {}

    def change(tensors: TENSORS) -> None:
        block = (20, 16) if kind == "fp8" else (32, 48) if kind == "modelopt" else (1, 48)
        tensors[name], scale = in_fp8(tensors[name], block)
        grown = scale.repeat_interleave(block[0], 0)[:32].repeat_interleave(block[1], 1)
        expected[name] = (tensors[name].float() * grown).bfloat16()
        stored = scale.reshape(()) if kind == "modelopt" else scale
        tensors[f"{name}_scale_inv" if kind == "fp8" else f"{name}_scale"] = stored.clone()
        tensors["model.layers.0.mlp.down_proj.input_scale"] = torch.ones(1)

    change_tensors(llama, change)
    weights = {"type": "float", "num_bits": 8, "strategy": "channel"}
    entries: dict[str, dict[str, Any]] = {
        "fp8": {"weight_block_size": [20, 16]},
        "compressed-tensors": {"format": "float-quantized", "config_groups": {"group_0": {"weights": weights}}},
        "modelopt": {"quant_algo": "FP8"},
    }
    change_config(llama, quantization_config={"quant_method": kind} | entries.get(kind, {}))
    loaded = load_model(str(llama), device="cpu")
    assert torch.equal(loaded.model.get_parameter(name), expected[name].float())
    assert loaded.notes == ("FP8 weights dequantized to bfloat16",)
    assert loaded.checkpoint_dtype == checkpoint_dtype(str(llama)) == torch.bfloat16
    assert getattr(loaded.model.config, "quantization_config", None) is None
    loaded.model.bfloat16().save_pretrained(llama.parent / "plain")
    shutil.copytree(
        llama, llama.parent / "plain", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*model*", "config*")
    )
    plain = load_model(str(llama.parent / "plain"), device="cpu")
    assert torch.equal(plain.model.get_parameter(name), loaded.model.get_parameter(name).float())


def test_fp8_without_its_scale_is_refused(llama: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(llama, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    change_config(llama, quantization_config={"quant_method": "fp8"})
    assert f"tensor {name} is stored in FP8 without a scale" in refusal(llama)


def test_fp8_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match="do not fit blocks"):
        dequantize_fp8(torch.ones(300, 128).to(torch.float8_e4m3fn), torch.ones(2, 2))


@pytest.mark.parametrize("columns", [128, 48])
def test_fp8_weights_may_be_one_block_wide(columns: int) -> None:
    scale = torch.tensor([[2.0], [3.0]])
    weight = dequantize_fp8(torch.ones(256, columns).to(torch.float8_e4m3fn), scale)
    assert torch.equal(weight, scale.repeat_interleave(128, 0).expand(256, columns).bfloat16())
    per_row, per_expert = torch.rand(2, 256, 1), torch.rand(2, 1, 1)
    for factors in (per_row, per_expert):
        weights = dequantize_fp8(torch.ones(2, 256, columns).to(torch.float8_e4m3fn), factors)
        assert torch.equal(weights, factors.expand(2, 256, columns).bfloat16())


def test_fp8_experts_are_gathered(tmp_path: Path) -> None:
    """Files hold one tensor for each expert, the model one for all."""
    config = Qwen3MoeConfig(**settings(num_experts=2, num_experts_per_tok=2, moe_intermediate_size=16))
    folder = save_source(Qwen3MoeForCausalLM(config), tmp_path / "moe")
    values = []

    def change(tensors: TENSORS) -> None:
        for index in range(2):
            name = f"model.layers.1.mlp.experts.{index}.down_proj.weight"
            tensors[name], scale = in_fp8(tensors[name], (16, 8))
            tensors[f"{name}_scale_inv"] = scale
            values.append(dequantize_fp8(tensors[name], scale, (16, 8)).float())

    change_tensors(folder, change)
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 8]})
    loaded = load_model(str(folder), device="cpu").model
    assert torch.equal(loaded.get_parameter("model.layers.1.mlp.experts.down_proj"), torch.stack(values))


def test_mxfp4_has_the_values_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(120, 134, (2, 6, 3), dtype=torch.uint8)
    assert torch.equal(dequantize_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


def test_mxfp4_experts_become_bfloat16(tmp_path: Path) -> None:
    options = settings(num_local_experts=2, num_experts_per_tok=1, sliding_window=16)
    options |= {"hidden_size": 32, "intermediate_size": 32}
    folder = save_source(GptOssForCausalLM(GptOssConfig(**options)), tmp_path / "oss")
    expected: TENSORS = {}

    def change(tensors: TENSORS) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 127, (experts, outputs, inputs // 32), dtype=torch.uint8)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
            expected[name] = dequantize_mxfp4(blocks, scales).float()

    change_tensors(folder, change)
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    loaded = load_model(str(folder), device="cpu")
    assert len(expected) == 4
    assert all(torch.equal(loaded.model.get_parameter(name), tensor) for name, tensor in expected.items())
    assert loaded.notes == ("MXFP4 weights dequantized to bfloat16",)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "hqq"])
def test_other_quantized_sources_are_refused(llama: Path, method: str) -> None:
    change_config(llama, quantization_config={"quant_method": method})
    (llama / "README.md").write_text("---\nlicense: mit\nbase_model:\n- somebody/something-1B\n---\n")
    message = refusal(llama)
    assert "is quantized already" in message
    assert "made from, somebody/something-1B" in message
