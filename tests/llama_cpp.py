"""What llama.cpp computes, by the package xllamacpp: a server of llama.cpp in a wheel."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xllamacpp

END = 2  # </s> of the tests' tokenizers


def _server(file: Path) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 256
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(parameters)


def llama_cpp_text(file: Path, prompt: str) -> str:
    """The most likely tokens after a prompt."""
    answer = _server(file).handle_completions({"prompt": prompt, "max_tokens": 8, "temperature": 0.0})
    return str(answer["choices"][0]["text"])


def llama_cpp_nll_of_last(file: Path, tokens: npt.NDArray[np.int64], vocabulary: int) -> npt.NDArray[np.float64]:
    """Loss of the last token of each sequence, shape (n_sequences,), of tokens of shape (n_sequences, length)."""
    server, losses = _server(file), []
    for sequence in tokens.tolist():
        # Scores are computed from the logits before the bias. The bias makes the server draw the end of the text: a
        # token that is half a character comes without scores.
        wanted = {"max_tokens": 1, "logprobs": vocabulary, "logit_bias": [[END, 1000.0]]}
        answer = server.handle_completions({"prompt": sequence[:-1], **wanted})
        scores = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        losses.append(-next(score["logprob"] for score in scores if score["id"] == sequence[-1]))
    return np.array(losses)
