"""Folders of models: small ones with the tests' tokenizer, and changes to them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from coopq.core.errors import ModelError
from coopq.model.load import load_model
from tests.conftest import STORIES

TENSORS = dict[str, Tensor]


def settings(**options: Any) -> dict[str, Any]:
    """Settings of a tiny language model for the tokenizer of the tests."""
    return {
        "vocab_size": len(AutoTokenizer.from_pretrained(STORIES)),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 77,
    } | options


def save_source(model: Any, folder: Path) -> Path:
    """Save a model with the tests' tokenizer, so that the folder can be quantized."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """Save a tiny Llama with a head of its own."""
    return save_source(LlamaForCausalLM(LlamaConfig(**settings(tie_word_embeddings=False))), folder)


def change_tensors(folder: Path, change: Callable[[TENSORS], Any]) -> None:
    """Change the tensors of a model's folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **entries: Any) -> None:
    """Change entries of a model's configuration."""
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
