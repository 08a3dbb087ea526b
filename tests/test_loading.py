"""What is loaded is what the files hold: nothing random, nothing dropped without a word, nothing of another class."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from coopq.core.errors import ModelError
from coopq.model.load import (
    checkpoint_dtype,
    empty_model,
    fingerprint_weights,
    load_model,
    load_skeleton,
    max_positions,
    pick_device,
)
from coopq.model.sources.gguf import gguf_file, gguf_shards, join_shards
from coopq.model.sources.scaled import dequantize_fp8, dequantize_mxfp4

TENSORS = dict[str, Tensor]


def settings(stories: str, **options: Any) -> dict[str, Any]:
    """Settings of a tiny language model for the tokenizer of the tests."""
    return {
        "vocab_size": len(AutoTokenizer.from_pretrained(stories)),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 77,
    } | options


def saved(model: Any, folder: Path, stories: str) -> Path:
    """A folder with a model and the tokenizer of the tests."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(stories: str, tmp_path: Path) -> Path:
    """A Llama with a head of its own."""
    model = LlamaForCausalLM(LlamaConfig(**settings(stories, tie_word_embeddings=False)))
    return saved(model, tmp_path / "llama", stories)


def change_tensors(folder: Path, change: Callable[[TENSORS], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refusal(source: Path | str) -> str:
    """The refusal of a model, which is one line."""
    with pytest.raises(ModelError) as caught:
        load_model(str(source), device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert "()" not in message
    return message


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_missing_weights_are_refused(llama: Path, name: str) -> None:
    change_tensors(llama, lambda tensors: tensors.pop(name))
    message = refusal(llama)
    assert "lacks 1 of the weights" in message
    assert name in message


def test_more_layers_than_the_file_holds_are_refused(llama: Path) -> None:
    change_config(llama, num_hidden_layers=3)
    assert "model.layers.2." in refusal(llama)


def test_missing_experts_are_refused(stories: str, tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**settings(stories, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16))
    folder = saved(Qwen3MoeForCausalLM(config), tmp_path / "moe", stories)
    load_model(str(folder), device="cpu")
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.down_proj.weight"))
    refusal(folder)


def test_weights_of_another_shape_are_refused(llama: Path) -> None:
    change_config(llama, intermediate_size=64)
    message = refusal(llama)
    assert "6 weights of another shape" in message
    assert "(32, 48) in the file, (32, 64) expected" in message


def test_unused_tensors_are_named(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_tensors(llama, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(4, 4)}))
    change_config(llama, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING):
        loaded = load_model(str(llama), device="cpu")
    assert loaded.notes[0].startswith("10 tensors of the files are not used and not saved: model.layers.1.")
    assert loaded.notes[0] in caplog.text


def test_harmless_buffers_are_not_named(llama: Path) -> None:
    change_tensors(llama, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(8)}))
    loaded = load_model(str(llama), device="cpu")
    assert loaded.notes == ()
    assert loaded.folder == llama


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


@pytest.mark.parametrize(("name", "value"), [("model.norm.weight", "nan"), ("model.embed_tokens.weight", "-inf")])
def test_values_that_are_not_finite_are_refused(llama: Path, name: str, value: str) -> None:
    change_tensors(llama, lambda tensors: tensors[name].view(-1)[-1:].fill_(float(value)))
    assert name in refusal(llama)


def test_another_head_in_the_file_unties(llama: Path) -> None:
    untied = load_model(str(llama), device="cpu").model
    change_config(llama, tie_word_embeddings=True)
    loaded = load_model(str(llama), device="cpu").model
    skeleton = load_skeleton(str(llama), device="cpu")
    for model in (loaded, skeleton):
        assert not model.config.tie_word_embeddings
        assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, untied.lm_head.weight)
    assert fingerprint_weights(loaded) == fingerprint_weights(untied)


@pytest.mark.parametrize("is_stored", [True, False])
def test_the_same_head_or_none_stays_tied(llama: Path, is_stored: bool) -> None:
    def change(tensors: TENSORS) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not is_stored:
            del tensors["lm_head.weight"]

    change_tensors(llama, change)
    change_config(llama, tie_word_embeddings=True)
    loaded = load_model(str(llama), device="cpu")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.notes == ()


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def wrapper(kind: str, stories: str) -> Any:
    """A tiny model that reads images and writes text."""
    if kind == "gemma3":
        text = settings(stories, sliding_window=16)
        vision = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
        return Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5)
        )
    text = settings(stories, model_type="llama")
    vision = VISION | {"model_type": "clip_vision_model", "projection_dim": 32}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=5))


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
@pytest.mark.parametrize("is_named", [True, False])
def test_wrappers_keep_all_their_parts(kind: str, is_named: bool, stories: str, tmp_path: Path) -> None:
    model = wrapper(kind, stories)
    folder = saved(model, tmp_path / kind, stories)
    if not is_named:
        change_config(folder, architectures=None)
    loaded = load_model(str(folder), device="cpu").model
    skeleton = load_skeleton(str(folder), device="cpu")
    assert type(loaded) is type(skeleton) is type(empty_model(loaded.config, torch.float32)) is type(model)
    expected = model.state_dict()
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert max_positions(loaded) == 77


def test_encoder_decoders_are_refused(stories: str, tmp_path: Path) -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=600)
    folder = saved(T5ForConditionalGeneration(config), tmp_path / "t5", stories)
    assert "have an encoder and a decoder" in refusal(folder)


def test_a_larger_tokenizer_is_refused_and_a_larger_embedding_is_not(stories: str, tmp_path: Path) -> None:
    for rows, fits in ((700, True), (100, False)):
        model = LlamaForCausalLM(LlamaConfig(**settings(stories, vocab_size=rows)))
        folder = saved(model, tmp_path / str(rows), stories)
        if fits:
            load_model(str(folder), device="cpu")
        else:
            assert "the model's embedding has 100 rows" in refusal(folder)


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


def test_mxfp4_has_the_values_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(120, 134, (2, 6, 3), dtype=torch.uint8)
    assert torch.equal(dequantize_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "hqq"])
def test_other_quantized_sources_are_refused(llama: Path, method: str) -> None:
    change_config(llama, quantization_config={"quant_method": method})
    (llama / "README.md").write_text("---\nlicense: mit\nbase_model:\n- somebody/something-1B\n---\n")
    message = refusal(llama)
    assert "is quantized already" in message
    assert "made from, somebody/something-1B" in message


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"hidden_size": "thirty"}, "cannot load model"),
        ({"num_hidden_layers": [2]}, "cannot load model"),
        ({"vocab_size": None}, "cannot load model"),
        ({"rope_parameters": 7}, "cannot load model"),
        ({"num_attention_heads": 0}, "cannot load model"),
        ({"model_type": "no_such_type"}, "cannot load model"),
        ({"model_type": 3}, "cannot load model"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "no language models"),
        ({"quantization_config": 4}, "is no object, but 4"),
    ],
)
def test_wrong_configurations_are_refused(llama: Path, entries: dict[str, Any], expected: str) -> None:
    change_config(llama, **entries)
    message = refusal(llama)
    assert expected in message
    assert "hub id that can be reached" not in message


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "[" * 100_000, "\ud800".encode("utf-16", "surrogatepass")])
def test_damaged_configurations_are_refused(llama: Path, text: str | bytes) -> None:
    (llama / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.json is damaged" in refusal(llama)


@pytest.mark.parametrize("text", ["{", '{"version": "1.0", "model": 3}', "[" * 100_000, ""])
def test_damaged_tokenizers_are_refused(llama: Path, text: str) -> None:
    (llama / "tokenizer.json").write_text(text)
    assert "tokenizer" in refusal(llama)


def test_missing_files_of_weights_are_refused(llama: Path) -> None:
    load_model(str(llama), device="cpu").model.save_pretrained(llama, max_shard_size="30KB")
    (llama / "model.safetensors").unlink()
    load_model(str(llama), device="cpu")
    shards = sorted(llama.glob("model-*.safetensors"))
    shards[1].unlink()
    assert shards[1].name in refusal(llama)
    (llama / "model.safetensors.index.json").write_text('{"weight_map": [')
    assert "index.json is damaged" in refusal(llama)


@pytest.mark.parametrize("size", [0, 4, 100])
def test_cut_weights_are_refused(llama: Path, size: int) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "model.safetensors is damaged" in refusal(llama)


def test_pickles_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    assert "pickle" in refusal(llama)
    (llama / "pytorch_model.bin").unlink()  # as it is for a model on the hub: such files are not downloaded
    assert "or convert its .bin files" in refusal(llama)


def test_names_of_folders(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert {load_model(name, device="cpu").folder for name in ("~/llama", "./llama", "llama", str(llama))} == {llama}
    assert "there is no folder './lama'" in refusal("./lama")
    assert "hub id that can be reached" in refusal("nobody/nothing")
    assert "is a file" in refusal("llama/config.json")


def test_the_meta_device_is_refused() -> None:
    with pytest.raises(ModelError, match="device 'meta' holds no values"):
        pick_device("meta")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has the device")
def test_mps_is_refused_where_it_is_not() -> None:
    with pytest.raises(ModelError, match="device 'mps' is not available here; use --device auto"):
        pick_device("mps")


def test_parts_of_a_gguf_file_are_joined(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    values = {f"blk.{index}.weight": torch.rand(4, 32).numpy() for index in range(4)}
    paths = [tmp_path / f"m-{index:05}-of-00002.gguf" for index in (1, 2)]
    for part, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_custom_alignment(64)
        if part == 0:
            writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
            writer.add_float32("llama.rope.freq_base", 5.0)
            writer.add_uint16("split.count", 2)
        for name in list(values)[2 * part : 2 * part + 2]:
            writer.add_tensor(name, gguf.quants.quantize(values[name], gguf.GGMLQuantizationType.Q8_0),
                              raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert gguf_file(str(paths[1])) == paths[0]
    joined = gguf.GGUFReader(join_shards(gguf_shards(paths[0]), tmp_path / "joined.gguf"))
    assert joined.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert joined.fields["llama.rope.freq_base"].contents() == 5.0
    assert not any(name.startswith("split.") for name in joined.fields)
    for tensor in joined.tensors:
        expected = gguf.quants.quantize(values[tensor.name], gguf.GGMLQuantizationType.Q8_0)
        assert (tensor.data == expected).all()
    assert len(joined.tensors) == 4
    paths[1].unlink()
    assert f"{paths[1].name} is missing" in refusal(paths[0])


def test_mxfp4_experts_become_bfloat16(stories: str, tmp_path: Path) -> None:
    options = settings(stories, num_local_experts=2, num_experts_per_tok=1, sliding_window=16)
    options |= {"hidden_size": 32, "intermediate_size": 32}
    folder = saved(GptOssForCausalLM(GptOssConfig(**options)), tmp_path / "oss", stories)
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


def test_fp8_experts_are_gathered(stories: str, tmp_path: Path) -> None:
    """Files hold one tensor for each expert, the model one for all."""
    config = Qwen3MoeConfig(**settings(stories, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=16))
    folder = saved(Qwen3MoeForCausalLM(config), tmp_path / "moe", stories)
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
