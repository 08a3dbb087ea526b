"""GGUF files of tiny models, written without llama.cpp's converter, so that they can be made wrong on purpose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from torch import Tensor

Change = Callable[[str, npt.NDArray[np.float32]], npt.NDArray[np.float32] | None]


def write_gguf(
    model: Any, path: Path, *, change: Change = lambda _, values: values, settings: dict[str, Any] | None = None
) -> Path:
    """A Llama-like model as a GGUF file in float32, its queries and keys in the order of transformers.

    Args:
        model: The model.
        path: The file.
        change: Makes other values of a tensor by its name in the file; None leaves the tensor out.
        settings: Settings by name that differ; None leaves a setting out.
    """
    config, architecture = model.config, model.config.model_type
    about: dict[str, Any] = {
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.tokens": [f"t{index}" for index in range(config.vocab_size)],
    } | (settings or {})
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in about.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
    if alignment := about.get("general.alignment"):
        writer.data_alignment = alignment
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    for parameter, tensor in model.named_parameters():
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        values = change(str(name), _plain(tensor))
        if values is not None:
            writer.add_tensor(str(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _plain(tensor: Tensor) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = tensor.detach().float().numpy()
    return values
