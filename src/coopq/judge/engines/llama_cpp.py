"""Losses of GGUF files by llama.cpp: by its own bindings, or by the bindings of a fork, which need no compiler."""

import ctypes
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.errors import BackendError
from coopq.core.versions import check_version

_OWN, _FORK = "llama-cpp-python", "ik-llama-cpp-python"
_TRIED = "0.1.5"
"""Version of the fork whose private modules, `_ctypes_api` and `_internals`, are in use."""
_IGNORE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
"""A log of llama.cpp that writes nothing; the library keeps a pointer to it."""
_Logits = Callable[[list[int]], npt.NDArray[np.float32]]
"""From the tokens of a sequence to logits, shape (length, vocabulary)."""


def llama_cpp_package() -> str:
    """Name and version of the package that computes: llama.cpp's own package where it is installed.

    The fork (0.1.5) has wrong losses for Q4_1 and Q5_1 in rows of 576 weights, and for experts in Mixtral's form.

    Raises:
        BackendError: If no package is installed.
    """
    for name in (_OWN, _FORK):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    raise BackendError(
        f"losses by llama.cpp need a package; run: pip install {_OWN} (needs a compiler), or {_FORK} (a fork)"
    )


class LlamaCppTokenizer:
    """The tokenizer in a GGUF file, with what `coopq.model.texts.HeldOut` needs of a tokenizer.

    Args:
        file: The GGUF file.
    """

    def __init__(self, file: Path) -> None:
        if llama_cpp_package().startswith(_OWN):
            from llama_cpp import Llama

            model = Llama(str(file), vocab_only=True, verbose=False)
            self._tokenize = lambda text, bos: model.tokenize(text.encode(), add_bos=bos, special=False)
        else:
            from ik_llama_cpp._internals import IkModel

            _silence_fork()
            fork = IkModel(str(file))
            self._tokenize = lambda text, bos: fork.tokenize(text, add_bos=bos, special=False)
        self.bos_token_id = next(iter(self.encode("")), None)

    def encode(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> list[int]:
        """Tokens of a text; characters that look like a special token stay text."""
        tokens: list[int] = self._tokenize(text, add_special_tokens)
        return tokens


def llama_cpp_nll(file: Path, tokens: npt.NDArray[np.int64], n_threads: int = 1) -> npt.NDArray[np.float64]:
    """Loss of each token but the first of each sequence, as the engine computes it.

    Args and errors: as for `llama_cpp_log_probabilities`.

    Returns:
        Shape (n_sequences, length - 1), nats.
    """
    scored = zip(llama_cpp_log_probabilities(file, tokens, n_threads), tokens, strict=True)
    return np.stack([token_nll(log_probabilities, sequence) for log_probabilities, sequence in scored])


def token_nll(log_probabilities: npt.NDArray[np.float32], sequence: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Losses of the tokens of a sequence after the first token.

    Args:
        log_probabilities: What the engine predicts after each token but the last, shape (length - 1, vocabulary).
        sequence: The tokens, shape (length,).
    Returns:
        Shape (length - 1,), nats.
    """
    return -log_probabilities[np.arange(len(log_probabilities)), sequence[1:]].astype(np.float64)


def llama_cpp_log_probabilities(
    file: Path, tokens: npt.NDArray[np.int64], n_threads: int = 1
) -> Iterator[npt.NDArray[np.float32]]:
    """What the engine predicts after each token but the last of a sequence.

    The engine rounds activations to 8 bits and keeps a KV cache in 16 bits, so its losses differ a little from ours.

    Args:
        file: The GGUF file.
        tokens: Shape (n_sequences, length).
        n_threads: Threads of the engine.
    Yields:
        Log-probabilities for each sequence, shape (length - 1, vocabulary).
    Raises:
        BackendError: If the package is missing.
    """
    is_own = llama_cpp_package().startswith(_OWN)
    compute = (_own if is_own else _fork)(str(file), tokens.shape[1], n_threads)
    for sequence in tokens.tolist():
        logits = compute(sequence)[:-1]
        below = logits - logits.max(axis=1, keepdims=True)
        yield below - np.log(np.exp(below).sum(axis=1, keepdims=True))


def _silence_fork() -> None:
    """Keep the fork from writing its log, hundreds of lines, to the terminal."""
    check_version(_FORK, _TRIED, "evaluation of .gguf files")
    from ik_llama_cpp import _ctypes_api as api

    api._lib.llama_log_set(_IGNORE, None)


def _own(file: str, length: int, n_threads: int) -> _Logits:
    """Logits by llama.cpp's own bindings."""
    from llama_cpp import Llama

    threads = {"n_threads": n_threads, "n_threads_batch": n_threads}
    model = Llama(file, n_ctx=length, n_batch=length, n_ubatch=length, **threads, logits_all=True, verbose=False)

    def compute(sequence: list[int]) -> npt.NDArray[np.float32]:
        model.reset()
        model.eval(sequence)
        logits: npt.NDArray[np.float32] = model.scores[: len(sequence)]  # the context may be longer
        return logits

    return compute


def _fork(file: str, length: int, n_threads: int) -> _Logits:
    """Logits by the fork's bindings."""
    from ik_llama_cpp import _ctypes_api as api
    from ik_llama_cpp._internals import IkContext, IkModel

    _silence_fork()
    model = IkModel(file)
    context = IkContext(model, n_ctx=length, n_threads=n_threads, flash_attn=False)

    def compute(sequence: list[int]) -> npt.NDArray[np.float32]:
        batch: Any = api.llama_batch_init(length, 0, 1)
        try:
            batch.n_tokens = length
            context.kv_cache_clear()
            for position, token in enumerate(sequence):
                batch.token[position], batch.pos[position], batch.logits[position] = token, position, 1
                batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
            if (status := context.decode(batch)) != 0:
                raise RuntimeError(f"llama_decode of {length} tokens returned {status}")
            rows = [api.llama_get_logits_ith(context.ctx, position) for position in range(length)]
            return np.stack([np.ctypeslib.as_array(row, (model.n_vocab,)) for row in rows])
        finally:
            api.llama_batch_free(batch)

    return compute
