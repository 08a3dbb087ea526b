"""llama.cpp's loss of an exported GGUF file against the loss of the saved model, for gguf_architectures.py."""

import contextlib
import multiprocessing
import shutil
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp

import coopq
from _tiny_models import logits_of, some_tokens
from _tiny_sizes import VOCABULARY

LENGTH = 16
"""Tokens of the text that llama.cpp judges: no more than the windows of the tiny models, which some converters drop."""
END = 2
TOLERANCE = 0.05
"""Largest mean difference of a token's loss, nats. Chosen by hand: llama.cpp rounds inputs to 8 bits, which is some
0.01 in these models, and losses of two different models differ by more than 0.3."""
ENGINE_SECONDS = 60


def compare_losses(source: Path, base: Path, saved: Path, file: Path) -> str:
    """How llama.cpp's loss of a file compares with that of the saved model, and if not well, why.

    A base that does not load, or has another loss than the model, is a matter of the converter or of llama.cpp. The
    same numbers in 32 bits tell how much of a difference is llama.cpp's rounding of inputs to 8 bits.
    """
    model = coopq.load(saved, device="cpu")
    found = _compared(model, file)
    if found.startswith("equal"):
        return found
    of_base = _compared(coopq.load_model(str(source), device="cpu").model, base)
    if not of_base.startswith("equal"):
        return f"{found}; the base: {of_base}"
    return f"{found}; the same numbers in 32 bits: {_compared(model, _in_32_bits(base, file))}"


def _in_32_bits(base: Path, file: Path) -> Path:
    """A copy of a base of 32 bits with the numbers of an exported file."""
    out = file.with_name("wide.gguf")
    shutil.copy(base, out)
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(base).tensors}
    with out.open("r+b") as handle:
        for tensor in gguf.GGUFReader(file).tensors:
            if tensor.tensor_type != there[tensor.name].tensor_type:
                handle.seek(there[tensor.name].data_offset)
                handle.write(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).tobytes())
    return out


def _compared(model: Any, file: Path) -> str:
    """How llama.cpp's loss of a file compares with that of a model."""
    tokens = some_tokens(1, LENGTH)
    chances = torch.log_softmax(logits_of(model, tokens)[0, :-1], dim=-1)
    ours = -chances.gather(1, tokens[0, 1:, None])[:, 0].numpy()
    receiving, sending = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")  # llama.cpp ends the process where it meets what it does not expect
    process = fork.Process(target=_llama_cpp_losses, args=(file, tokens[0].tolist(), sending))
    process.start()
    sending.close()
    theirs = None
    with contextlib.suppress(EOFError):
        theirs = receiving.recv() if receiving.poll(ENGINE_SECONDS) else "takes too long"
    process.kill()
    process.join()
    if theirs is None or isinstance(theirs, str):
        return f"does not load: {theirs or f'ends with code {process.exitcode}'}"
    off = float(np.abs(ours - np.array(theirs)).mean())
    return f"{'equal' if off <= TOLERANCE else 'differs'}: {off:.4f} nats"


def _llama_cpp_losses(file: Path, sequence: list[int], pipe: Connection) -> None:
    """Send the loss of each token after the first, by a server of llama.cpp, or what the server says."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 256
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    try:
        server = xllamacpp.Server(parameters)
        losses = []
        for n in range(1, len(sequence)):
            # The bias makes the server draw the end of the text; scores are computed without the bias.
            wanted = {"max_tokens": 1, "logprobs": VOCABULARY, "logit_bias": [[END, 1000.0]]}
            answer = server.handle_completions({"prompt": sequence[:n], **wanted})
            scores = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            losses.append(-next(score["logprob"] for score in scores if score["id"] == sequence[n]))
        pipe.send(losses)
    except (KeyError, RuntimeError, StopIteration) as error:
        pipe.send(f"{type(error).__name__}: {error}")
