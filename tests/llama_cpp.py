"""llama.cpp: losses of a GGUF file by the fork in ik-llama-cpp-python, and text by xllamacpp, the original."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import xllamacpp
from ik_llama_cpp import _ctypes_api as api
from ik_llama_cpp._internals import IkContext, IkModel


def llama_cpp_nll(file: Path, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Loss of each token but the first of each sequence, nats; shape (n_sequences, length - 1)."""
    n_sequences, length = tokens.shape
    model = IkModel(str(file))
    context = IkContext(model, n_ctx=length, n_threads=1, flash_attn=False)
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


def llama_cpp_text(file: Path, prompt: str) -> str:
    """Some tokens after a prompt, the likeliest ones."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 256
    server = xllamacpp.Server(parameters)
    answer = server.handle_completions({"prompt": prompt, "max_tokens": 8, "temperature": 0.0})
    return str(answer["choices"][0]["text"])
