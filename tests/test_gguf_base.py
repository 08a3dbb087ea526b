"""What a GGUF file must be so that an export starts from it."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf

from coopq.core.errors import CoopQError, ExportError, Mismatch, ModelError, OutputError
from coopq.core.specs import Request
from coopq.export.formats import export_model, predicted_bytes, target_sizes
from coopq.export.gguf.base import BaseFile, BaseTensor
from coopq.export.gguf.names import require_settings
from coopq.model.load import fingerprint_weights, load_model
from coopq.model.players import find_players
from coopq.quantizers import get_backend
from tests.architectures import GROUPED
from tests.checkpoints import plan_for, save
from tests.folders import save_source
from tests.gguf_files import write_gguf


def tiny_model() -> Any:
    """A tiny Qwen-3 with the tests' tokenizer's vocabulary."""
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(hf.Qwen3Config(**{**GROUPED, "vocab_size": 512})).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-3 in a folder, saved at 4, 8 and 16 bits, with its GGUF file."""
    folder = tmp_path_factory.mktemp("base")
    save_source(tiny_model(), folder / "model")
    loaded = load_model(str(folder / "model"), device="cpu")
    plan = plan_for(loaded.model, "ggml", None, [4, 8, 16])
    plan = plan.replace(
        request=plan.request.replace(model=str(folder / "model")),
        fingerprint={**plan.fingerprint, "weights": fingerprint_weights(loaded.model)},
    )
    save(loaded, plan, folder / "saved", np.arange(64).reshape(2, 32) % 97)
    write_gguf(loaded.model, folder / "base.gguf")
    return folder


def sizes(model: Path, base: Path) -> Any:
    """What a session that is opened learns of a base."""
    request = Request.from_options(
        model=str(model), backend="ggml", bits=(4, 8, 16), target="gguf", base=str(base), tokens=64, sequence_length=32
    )
    loaded = load_model(str(model), device="cpu")
    backend = get_backend(request.quantizer, request.widths.bits)
    return target_sizes(request, loaded.model, find_players(loaded.model), backend)


def test_an_export_holds_the_weights_that_were_saved(source: Path, tmp_path: Path) -> None:
    n_bytes = export_model(source / "saved", "gguf", tmp_path / "out.gguf", base=source / "base.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")  # the package's own reader
    assert n_bytes == (tmp_path / "out.gguf").stat().st_size
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert [kinds[f"blk.{index}.attn_q.weight"] for index in range(3)] == ["IQ4_NL", "Q8_0", "F16"]
    assert reader.fields["qwen3.block_count"].contents() == 3


@pytest.mark.parametrize("damage", ["empty", "garbage", "short", "half", "version", "count", "folder", "missing"])
def test_a_damaged_base_is_refused_when_the_session_opens(source: Path, tmp_path: Path, damage: str) -> None:
    data, file = (source / "base.gguf").read_bytes(), tmp_path / "bad.gguf"
    damaged = {
        "empty": b"",
        "garbage": b"\x93" * 4096,
        "short": data[:100],
        "half": data[: len(data) // 2],
        "version": data[:4] + struct.pack("<I", 77) + data[8:],
        "count": data[:8] + struct.pack("<QQ", 2**60, 2**60) + data[24:],
    }
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes(damaged[damage])
    with pytest.raises((ExportError, ModelError), match=r"bad\.gguf") as error:
        sizes(source / "model", file)
    assert "\n" not in str(error.value)


def _error_of(file: Path) -> str | None:
    try:
        base = BaseFile.open(file)
        _ = base.architecture, base.n_blocks
    except CoopQError as error:
        return str(error)
    return None


def test_every_short_file_is_one_line(source: Path, tmp_path: Path) -> None:
    data, file = (source / "base.gguf").read_bytes(), tmp_path / "bad.gguf"
    generator = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(data[: generator.integers(24, len(data))])
        for place in generator.integers(0, min(2000, len(bad)), size=8):
            bad[place] = generator.integers(0, 256)
        file.write_bytes(bad)
        message = _error_of(file)
        assert message is None or "\n" not in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qwen3.block_count": None}, "qwen3.block_count = None"),
        ({"qwen3.block_count": 2}, "no tensor of its own"),
        ({"qwen3.rope.freq_base": 500.0}, r"qwen3.rope.freq_base \(rope.freq_base: 500.0 there, 10000.0 here\)"),
        ({"qwen3.attention.layer_norm_rms_epsilon": 1e-3}, "layer_norm_rms_epsilon"),
        ({"qwen3.attention.head_count": 8}, "head_count: 8 there, 4 here"),
        ({"qwen3.embedding_length": 64}, "embedding_length"),
        ({"tokenizer.ggml.tokens": ["a"] * 600}, "tokens of its tokenizer: 600 there, 512 here"),
    ],
)
def test_settings_of_another_model_are_refused(
    source: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    file = write_gguf(tiny_model(), tmp_path / "base.gguf", settings=settings)
    with pytest.raises((ExportError, Mismatch), match=message):
        sizes(source / "model", file)


def test_a_missing_base_of_rotary_embeddings_is_llama_cpps_default(tmp_path: Path) -> None:
    """A converter that is older than the configuration's format leaves the setting out."""
    file = BaseFile.open(write_gguf(tiny_model(), tmp_path / "base.gguf", settings={"qwen3.rope.freq_base": None}))
    config = tiny_model().config
    require_settings(file, config)
    config.rope_parameters["rope_theta"] = 500_000.0
    with pytest.raises(Mismatch, match=r"rope.freq_base: 10000.0 there, 500000.0 here"):
        require_settings(file, config)


@pytest.mark.parametrize("settings", [{"general.alignment": 64}, {"general.tags": [[1, 2], [3]]}, {"a.name": ["x"]}])
def test_odd_but_valid_files_work(source: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    file = write_gguf(load_model(str(source / "model"), device="cpu").model, tmp_path / "b.gguf", settings=settings)
    sizes(source / "model", file)
    export_model(source / "saved", "gguf", tmp_path / "out.gguf", base=file)
    before, after = BaseFile.open(file), BaseFile.open(tmp_path / "out.gguf")
    assert before.alignment == after.alignment == settings.get("general.alignment", 32)
    assert all(after.settings[name].raw == setting.raw for name, setting in before.settings.items())


@pytest.mark.parametrize(
    "name",
    ["output_norm.weight", "output.weight", "token_embd.weight", "blk.1.attn_norm.weight", "blk.2.attn_q.weight"],
)
def test_missing_and_other_tensors_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    model = load_model(str(source / "model"), device="cpu").model
    less = write_gguf(model, tmp_path / "less.gguf", change=lambda found, values: None if found == name else values)
    with pytest.raises((Mismatch, ExportError), match=name.removesuffix(".weight")):
        sizes(source / "model", less)
    other = write_gguf(
        model, tmp_path / "other.gguf", change=lambda found, values: values * 1.5 if found == name else values
    )
    with pytest.raises(Mismatch, match=f"{name} of the GGUF file .*is not"):
        export_model(source / "saved", "gguf", tmp_path / "out.gguf", base=other)
    broken = write_gguf(
        model, tmp_path / "nan.gguf", change=lambda found, values: values * np.nan if found == name else values
    )
    with pytest.raises(ExportError, match=f"{name} of the GGUF file holds numbers that are not finite"):
        export_model(source / "saved", "gguf", tmp_path / "out.gguf", base=broken)
    assert not (tmp_path / "out.gguf").exists()


def test_a_split_base_is_read_whole(source: Path, tmp_path: Path) -> None:
    model = load_model(str(source / "model"), device="cpu").model
    first, second = (tmp_path / f"m-{index:05}-of-00002.gguf" for index in (1, 2))
    for file, is_first in ((first, True), (second, False)):
        write_gguf(
            model,
            file,
            change=lambda name, values, wanted=is_first: values if name.startswith("blk.0") == wanted else None,  # type: ignore[misc]
            settings={"split.count": 2, "split.tensors.count": 36},
        )
    n_tensors = len(BaseFile.open(first).tensors)
    assert n_tensors == len(list(model.parameters())) == 36
    export_model(source / "saved", "gguf", tmp_path / "out.gguf", base=second)
    whole = BaseFile.open(tmp_path / "out.gguf")
    assert len(whole.tensors) == n_tensors
    assert not any(name.startswith("split.") for name in whole.settings)
    with pytest.raises(OutputError, match="is the same as the input"):
        export_model(source / "saved", "gguf", second, base=first)
    second.rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(ModelError, match=r"00002-of-00002\.gguf is missing"):
        BaseFile.open(first)
    with pytest.raises(ExportError, match="is a part of a model of 36 tensors"):
        BaseFile.open(first.rename(tmp_path / "alone.gguf"))


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    missing = tmp_path / "missing.gguf"
    with pytest.raises(OutputError, match=r"output .*folder is a folder; name a file"):
        export_model(source / "saved", "gguf", tmp_path / "folder", base=missing)
    with pytest.raises(OutputError, match=r"cannot write to .*file: .*; choose another folder"):
        export_model(source / "saved", "gguf", tmp_path / "file" / "out.gguf", base=missing)


def test_an_output_whose_numbers_are_not_finite_does_not_appear(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseTensor, "is_finite", lambda tensor: tensor.name != "blk.1.attn_q.weight")
    with pytest.raises(ExportError, match=r"blk\.1\.attn_q\.weight would hold numbers that are not finite at 8 bits"):
        export_model(source / "saved", "gguf", tmp_path / "out.gguf", base=source / "base.gguf")
    assert not list(tmp_path.iterdir())


def test_no_output_is_an_input(source: Path, tmp_path: Path) -> None:
    before = (source / "base.gguf").read_bytes()
    (tmp_path / "link.gguf").symlink_to(source / "base.gguf")
    inputs = [source / "base.gguf", tmp_path / "link.gguf", source / "saved" / "quantized.safetensors"]
    for out in inputs:
        with pytest.raises(OutputError, match="another place"):
            export_model(source / "saved", "gguf", out, base=source / "base.gguf")
    assert (source / "base.gguf").read_bytes() == before


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", 1e6), ("float32", 1e-8)])
def test_large_and_small_weights_of_bfloat16_stay_as_they_are(dtype: str, value: float, tmp_path: Path) -> None:
    """Whatever is computed in: float16 has neither of these values."""
    model = tiny_model().bfloat16()
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[0, 0] = value
    save_source(model, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), dtype=dtype, device="cpu")
    plan = plan_for(loaded.model, "ggml", None, [8, 8, 16])
    plan = plan.replace(
        request=plan.request.replace(model=str(tmp_path / "model")),
        fingerprint={**plan.fingerprint, "weights": fingerprint_weights(loaded.model)},
    )
    save(loaded, plan, tmp_path / "saved", np.arange(64).reshape(2, 32) % 97)
    base = write_gguf(loaded.model, tmp_path / "base.gguf")
    export_model(tmp_path / "saved", "gguf", tmp_path / "out.gguf", base=base)
    written = BaseFile.open(tmp_path / "out.gguf").tensors["blk.2.attn_q.weight"]
    assert written.tensor_type.name == "BF16"
    expected = loaded.model.model.layers[2].self_attn.q_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(written.values(), expected)
    assert predicted_bytes(plan, "gguf", base=base) == (tmp_path / "out.gguf").stat().st_size
