"""llama.cpp's own mixes of types, and losses of GGUF files by llama.cpp, kept by content of the files."""

import ctypes
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

import llama_cpp
from coopq.core.files import read_json, write_json
from coopq.core.specs import TextSpec
from coopq.core.types import Losses
from coopq.judge.engines.llama_cpp import llama_cpp_log_probabilities, llama_cpp_package, token_nll
from coopq.model.load import load_model
from coopq.model.players import find_players
from coopq.model.texts import fitting_set
from coopq.quantizers.input_statistics import column_importance

Importance = Mapping[str, npt.NDArray[np.float32]]
"""Importance of the columns of each tensor, by the tensor's name in the GGUF file."""


@dataclass(frozen=True)
class Judged:
    """Losses of files on one text, means of every window, each of shape (n_windows,), nats per token.

    Attributes:
        nll: Negative log-likelihood.
        divergence: KL divergence from the first file in what is predicted after each token.
    """

    nll: dict[Path, Losses]
    divergence: dict[Path, Losses]


def engine_name() -> str:
    """The package that computes, and the library where that is another than the package's own."""
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    library = f", library {(Path(folder) / 'libllama.so').resolve().name}" if folder else ""
    return llama_cpp_package() + library


def tensor_importance(source: str, base: Path, text: TextSpec) -> Importance:
    """The importance matrix of the tokens that our weights are fitted to.

    Args:
        source: The model.
        base: The model's own GGUF file, whose names of tensors are taken.
        text: The calibration text.
    """
    loaded = load_model(source, device="cpu")
    names = [linear.name for player in find_players(loaded.model, embeddings=True) for linear in player.linears]
    fields = gguf.GGUFReader(base).fields
    architecture = str(fields["general.architecture"].contents())
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    n_blocks = int(fields[f"{architecture}.block_count"].contents())
    names_in_file = gguf.get_tensor_name_map(kinds[architecture], n_blocks)
    importance = column_importance(loaded.model, names, fitting_set(text, loaded.tokenizer).tokens)
    return {f"{names_in_file.get_name(name)}.weight": values.numpy() for name, values in importance.items()}


def make_mix(base: Path, mix: str, importance: Importance, out: Path, embedding: str = "") -> None:
    """Quantize a GGUF file by one of llama.cpp's own mixes.

    Args:
        base: The model's own GGUF file.
        mix: Name of the mix, "Q4_K_S" for example.
        importance: The importance matrix.
        out: Where the file goes.
        embedding: Type of the embedding, "Q8_0" for example; without one, the type is the mix's own.
    """
    data = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last entry, empty, ends the array
    pointer = ctypes.POINTER(ctypes.c_float)
    for entry, (name, values) in zip(data, importance.items(), strict=False):
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data_as(pointer), len(values)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix}")
    params.allow_requantize, params.imatrix = True, data
    if embedding:
        params.token_embedding_type = int(gguf.GGMLQuantizationType[embedding])
    failed = llama_cpp.llama_model_quantize(str(base).encode(), str(out).encode(), ctypes.byref(params))
    assert not failed, mix


def judge_files(files: Sequence[Path], tokens: npt.NDArray[np.int64], n_threads: int, kept: Path) -> Judged:
    """Losses of files by llama.cpp; files that were judged before are not judged again.

    Args:
        files: GGUF files; the first is the model's own, which divergences start from.
        tokens: Shape (n_windows, length).
        n_threads: Threads of llama.cpp.
        kept: Folder of the record of losses.
    """
    record = kept / f"judged-{hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()}.json"
    known: dict[str, list[list[float]]] = read_json(record) if record.exists() else {}
    base = files[0]
    engine_and_base = f"{engine_name()} {file_digest(base)}"
    keys = {file: f"{engine_and_base} {file_digest(file)}" for file in files}
    own: list[npt.NDArray[np.float32]] = []
    for file in files:  # one at a time: a context of each file would take gigabytes
        if keys[file] not in known:
            own = own or list(llama_cpp_log_probabilities(base, tokens, n_threads))
            found = own if file == base else llama_cpp_log_probabilities(file, tokens, n_threads)
            known[keys[file]] = _losses(found, own, tokens)
            write_json(record, known)
    nll, divergence = ({file: np.array(known[keys[file]][row]) for file in files} for row in (0, 1))
    return Judged(nll, divergence)


def _losses(
    predicted: Iterable[npt.NDArray[np.float32]], own: Sequence[npt.NDArray[np.float32]], tokens: npt.NDArray[np.int64]
) -> list[list[float]]:
    """Loss of predictions on each window, and their divergence from the predictions of the model's own file."""
    windows = [
        (float(token_nll(scores, sequence).mean()), float((np.exp(true) * (true - scores)).sum(axis=1).mean()))
        for scores, true, sequence in zip(predicted, own, tokens, strict=True)
    ]
    return [list(row) for row in zip(*windows, strict=True)]


def file_digest(file: Path) -> str:
    """A hash of a file's content."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def describe_types(file: Path) -> str:
    """Types of the weights of a GGUF file, the most frequent first, for people."""
    types = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1)
    return ", ".join(f"{n} of {kind}" for kind, n in types.most_common())
