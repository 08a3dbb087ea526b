"""The folder that a model is read from, and its configuration and tokenizer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, by its version
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.utils import cached_file

from coopq.core.errors import ModelError, one_line
from coopq.core.files import expanded
from coopq.model.sources.gguf import convert_gguf, gguf_file, gguf_shards
from coopq.model.sources.stored import has_weights, stored_entries, usual_dtype, weight_files

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*", "tokenizer*"]
"""What is read of a model on the hub."""
_UNWANTED = ["*/*", "consolidated*"]
"""A second copy of the weights in another form, as some models on the hub have it."""


def find_folder(source: str) -> Path:
    """The folder with a model's config.json: on the hub, a local one, or the conversion of a GGUF file.

    Args:
        source: Hub id, folder, GGUF file, or the name of the demo model.
    Raises:
        ModelError: If there is no such model.
    """
    if (file := gguf_file(source)) is not None:
        return convert_gguf(file)
    if not source.strip():
        raise ModelError("the model has no name; give a hub id, a folder, a .gguf file, or 'demo'")
    path = expanded(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"folder {path} holds no config.json, so it is not a model; give a Hugging Face model folder"
            )
        return path.resolve()
    if path.is_file():
        raise ModelError(f"model {source!r} is a file; give its folder, or a .gguf file")
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ModelError(f"there is no folder {source!r}; check the path, or give a hub id")
    with _on_hub(source):
        return Path(str(cached_file(source, "config.json"))).parent


def with_weights(source: str, folder: Path) -> Path:
    """The folder of a model with its weights, downloaded if the model is on the hub.

    Raises:
        ModelError: If the hub cannot be reached.
    """
    if gguf_file(source) is not None or expanded(source).is_dir():
        return folder
    with _on_hub(source):
        return Path(snapshot_download(source, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))


@contextmanager
def _on_hub(source: str) -> Iterator[None]:
    """Turn what stands between this machine and the hub into an error of one line: a proxy's errors are no OSErrors."""
    try:
        yield
    except HTTPError as error:
        raise ModelError(
            f"cannot reach the hub for model {source!r} ({one_line(error)}); check the network and its proxy, or give "
            "a local folder"
        ) from error


def weights_bytes(source: str, folder: Path) -> int:
    """Bytes of the files that hold a model's weights.

    Args:
        source: The model's name.
        folder: The folder that the model is read from; a GGUF file counts as it is, not as it was converted.
    """
    file = gguf_file(source)
    files = weight_files(folder) if file is None else gguf_shards(file)
    return sum(path.stat().st_size for path in files)


def read_config(folder: Path) -> tuple[Any, dict[str, Any] | None]:
    """The configuration of transformers, and the `quantization_config` of the file, which the configuration loses.

    Raises:
        ModelError: If config.json is damaged.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({one_line(error)}); download the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged (no object, but {type(content).__name__}); download the model again")
    nested = content.get("text_config")
    settings = content.get("quantization_config") or (
        nested.get("quantization_config") if isinstance(nested, dict) else None
    )
    if settings is not None and not isinstance(settings, dict):
        raise ModelError(f"quantization_config in {path} is no object, but {settings!r:.50}; correct it")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    return config, settings


def stored_dtype(source: str, folder: Path, config: Any) -> torch.dtype:
    """The dtype that a configuration names; without a name, the dtype of most weights of the files.

    A folder that has neither is taken for float32. Weights on the hub are downloaded if the configuration names none.
    """
    named: torch.dtype | None = config.get_text_config().dtype or config.dtype
    if named is None and has_weights(folder := with_weights(source, folder)):
        named = usual_dtype(stored_entries(folder))
    return named or torch.float32


def read_tokenizer(folder: Path, rows: int | None) -> Any:
    """The tokenizer of a model.

    Args:
        folder: The model's folder.
        rows: Rows of the model's embedding; None skips the comparison.
    Raises:
        ModelError: If the tokenizer cannot be read, or makes ids that the model has no rows for.
    """
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, KeyError, OSError):
            if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
                raise
            tokenizer = AutoProcessor.from_pretrained(folder, trust_remote_code=False).tokenizer
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ModelError(
            f"the tokenizer in {folder} cannot be read ({one_line(error)}); add or correct tokenizer.json and "
            "tokenizer_config.json"
        ) from error
    if rows is not None:
        # Special tokens beyond the embedding exist (Gemma-3's <image_soft_token>), and no text holds one.
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        largest = max(set(tokenizer.get_vocab().values()) - special, default=0)
        if largest >= rows:
            raise ModelError(
                f"the tokenizer in {folder} makes ids up to {largest}, and the model's embedding has {rows} rows; give "
                "the tokenizer that belongs to the model, or resize the embedding"
            )
    return tokenizer
