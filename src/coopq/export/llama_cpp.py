"""Losses of GGUF files by llama.cpp: by its fork in the package ik-llama-cpp-python, whose wheel needs no compiler."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from coopq.errors import BackendError


def llama_cpp_nll(file: Path, tokens: npt.NDArray[np.int64], n_threads: int = 1) -> npt.NDArray[np.float64]:
    """Loss of each token but the first of each sequence, as the engine computes it.

    It rounds activations to eight bits, so that losses differ a little from ours, and keeps its cache in 16 bits.

    Args:
        file: The GGUF file.
        tokens: Shape (n_sequences, length).
        n_threads: Of the engine.
    Returns:
        Shape (n_sequences, length - 1), nats.
    Raises:
        BackendError: If the package is missing.
    """
    try:
        from ik_llama_cpp import _ctypes_api as api
        from ik_llama_cpp._internals import IkContext, IkModel
    except ImportError as error:
        raise BackendError(
            f"losses by llama.cpp need a package ({error}); run: pip install ik-llama-cpp-python"
        ) from error
    n_sequences, length = tokens.shape
    model = IkModel(str(file))
    context = IkContext(model, n_ctx=length, n_threads=n_threads, flash_attn=False)
    batch = api.llama_batch_init(length, 0, 1)
    batch.n_tokens = length
    losses = np.empty((n_sequences, length - 1))
    for index, sequence in enumerate(tokens):
        context.kv_cache_clear()
        for position, token in enumerate(sequence):
            batch.token[position], batch.pos[position], batch.logits[position] = int(token), position, 1
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        assert context.decode(batch) == 0
        for position in range(length - 1):
            pointer = api.llama_get_logits_ith(context.ctx, position)
            logits = np.ctypeslib.as_array(pointer, (model.n_vocab,)).astype(np.float64)
            most = logits.max()
            losses[index, position] = most + np.log(np.exp(logits - most).sum()) - logits[sequence[position + 1]]
    api.llama_batch_free(batch)
    return losses
