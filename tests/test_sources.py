"""What the files of a model are: their dtype, their bytes, and the folders that GGUF files are converted to."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coopq.model.load import checkpoint_dtype, load_model, load_skeleton
from tests.test_loading import change_config, saved, settings


@pytest.fixture
def narrow(stories: str, tmp_path: Path) -> Path:
    """A Llama in bfloat16."""
    model = LlamaForCausalLM(LlamaConfig(**settings(stories, tie_word_embeddings=False)))
    return saved(model.bfloat16(), tmp_path / "llama", stories)


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
