"""What is loaded is what the files hold: nothing random, nothing dropped without a word, nothing of another class."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
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
from coopq.model.load import empty_model, fingerprint_weights, load_model, load_skeleton, max_positions, pick_device
from coopq.model.sources.gguf import gguf_file, gguf_shards, join_shards
from tests.folders import TENSORS, change_config, change_tensors, refusal, save_llama, save_source, settings


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama with a head of its own."""
    return save_llama(tmp_path / "llama")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_missing_weights_are_refused(llama: Path, name: str) -> None:
    change_tensors(llama, lambda tensors: tensors.pop(name))
    message = refusal(llama)
    assert "lacks 1 of the weights" in message
    assert name in message


def test_more_layers_than_the_file_holds_are_refused(llama: Path) -> None:
    change_config(llama, num_hidden_layers=3)
    assert "model.layers.2." in refusal(llama)


def test_missing_experts_are_refused(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**settings(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16))
    folder = save_source(Qwen3MoeForCausalLM(config), tmp_path / "moe")
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


def wrapper(kind: str) -> Any:
    """A tiny model that reads images and writes text."""
    if kind == "gemma3":
        text = settings(sliding_window=16)
        vision = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
        return Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5)
        )
    text = settings(model_type="llama")
    vision = VISION | {"model_type": "clip_vision_model", "projection_dim": 32}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=5))


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
@pytest.mark.parametrize("is_named", [True, False])
def test_wrappers_keep_all_their_parts(kind: str, is_named: bool, tmp_path: Path) -> None:
    model = wrapper(kind)
    folder = save_source(model, tmp_path / kind)
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


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=600)
    folder = save_source(T5ForConditionalGeneration(config), tmp_path / "t5")
    assert "have an encoder and a decoder" in refusal(folder)


def test_a_larger_tokenizer_is_refused_and_a_larger_embedding_is_not(tmp_path: Path) -> None:
    for rows, fits in ((700, True), (100, False)):
        model = LlamaForCausalLM(LlamaConfig(**settings(vocab_size=rows)))
        folder = save_source(model, tmp_path / str(rows))
        if fits:
            load_model(str(folder), device="cpu")
        else:
            assert "the model's embedding has 100 rows" in refusal(folder)


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


@pytest.mark.parametrize("size", [0, 4, 100, -100])
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
