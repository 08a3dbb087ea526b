"""What the files of a model are: their dtype, their bytes, and the folders that GGUF files are converted to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coopq.core.errors import ModelError, OutOfMemory
from coopq.model.load import _naming, checkpoint_dtype, load_model, load_skeleton
from coopq.model.safetensors_io import save_tensors
from coopq.model.sources import gguf
from tests.folders import change_config, save_source, settings


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A Llama in bfloat16."""
    model = LlamaForCausalLM(LlamaConfig(**settings(tie_word_embeddings=False)))
    return save_source(model.bfloat16(), tmp_path / "llama")


def test_a_configuration_without_a_dtype_leaves_it_to_the_weights(narrow: Path) -> None:
    change_config(narrow, dtype=None)
    assert checkpoint_dtype(str(narrow)) == torch.bfloat16
    assert load_model(str(narrow), device="cpu").checkpoint_dtype == torch.bfloat16
    (narrow / "model.safetensors").unlink()
    assert checkpoint_dtype(str(narrow)) == torch.float32, "a configuration alone is enough for a forecast"


def test_the_bytes_of_a_model_are_those_of_the_files_that_are_read(narrow: Path) -> None:
    weights = narrow / "model.safetensors"
    shutil.copy(weights, narrow / "consolidated.safetensors")
    assert load_model(str(narrow), device="cpu").source_bytes == weights.stat().st_size
    weights.unlink()
    load_skeleton(str(narrow), device="cpu")  # a configuration alone: the other file is not read


def test_a_gguf_file_is_hashed_once_and_converted_again_by_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def write(path: Path, shards: list[Path], folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(gguf, "_write_converted", write)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    gguf._digest.cache_clear()
    first = gguf.convert_gguf(file)
    assert gguf.convert_gguf(file) == first
    assert (gguf._digest.cache_info().misses, gguf._digest.cache_info().hits) == (1, 1)
    file.write_bytes(b"another")
    assert gguf.convert_gguf(file) != first
    file.write_bytes(b"one")
    assert gguf.convert_gguf(file) == first
    for name in ("_CONVERSION", "transformers.__version__"):
        with monkeypatch.context() as patch:
            patch.setattr(f"coopq.model.sources.gguf.{name}", 99)
            assert gguf.convert_gguf(file) != first


def test_too_little_memory_and_a_full_disk_have_ways_out_of_their_own() -> None:
    with pytest.raises(OutOfMemory, match="use --dtype bfloat16"), _naming("demo"):
        torch.empty(2**55, dtype=torch.uint8)
    with pytest.raises(OutOfMemory, match="CUDA out of memory"), _naming("demo"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(ModelError, match="free disk space"), _naming("demo"), Path("/dev/full").open("wb", 0) as full:
        full.write(b"weights")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_written_weights_have_the_mode_that_the_user_chose(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


def test_two_processes_write_the_same_file(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, torch; from coopq.model.safetensors_io import save_tensors; "
        "about = dict.fromkeys('abcdefgh', '2'); "  # safetensors writes them in any order
        "save_tensors({'x': torch.arange(7.0), 'y': torch.zeros(3, dtype=torch.uint8)}, pathlib.Path(sys.argv[1]), "
        "about)"
    )
    for index in range(2):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / str(index))], check=True)
    assert len({(tmp_path / str(index)).read_bytes() for index in range(2)}) == 1
