"""What an engine computes of a file that was written for it, beside what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.errors import ExportError
from coopq.core.types import Losses, ProgressCallback
from coopq.export.checkpoint import load
from coopq.export.verification import token_losses
from coopq.model.memory import free_memory
from coopq.model.sources.folder import read_tokenizer
from coopq.model.sources.gguf import gguf_shards
from coopq.plan.plan import Plan

_PACKAGE = "xllamacpp"
_PASSAGE = (
    "The lighthouse stands on a rock at the mouth of the river. Every evening the keeper climbs its two hundred steps, "
    "lights the lamp and writes down the weather. In winter the ships are few, but the light is never out."
)
"""What models are tried on."""
_N_PREFIXES = 16
"""Prefixes of the passage whose next token llama.cpp scores: it gives scores of one position a request."""
_LIKELY = 200
"""Most likely tokens that the server scores first; it scores the whole vocabulary where another token follows."""
_BIAS = 1000.0
"""Added to the logit of the token that ends the text, so that the server draws it. The server gives scores before the
bias. It gives none if it draws a token that is part of a character."""
_MOST = 0.2
"""Most mean difference of a token's loss, nats. llama.cpp rounds activations to 8 bits; wrong weights differ more."""
_PROMPT, _MOST_TOKENS = "The most important thing is", 24


@dataclass(frozen=True)
class EngineCheck:
    """What an engine computes.

    Attributes:
        engine: Name and version of the package that computes.
        loss: Mean loss of the tokens tried, by the engine, nats.
        ours: The same by the weights that were measured.
        text: What the engine writes after a prompt.
        before: What the engine writes with the model in full precision; None where that file is not tried.
        speed: Tokens that the engine writes in a second with the file, and with the model in full precision.
    """

    engine: str
    loss: float
    ours: float
    text: str
    before: str | None = None
    speed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Delivery:
    """What was made for an engine.

    Attributes:
        plan: The plan.
        out: The file or the folder.
        saved: Folder of the saved model that the output was made of.
        check: What llama.cpp computes with the file; None for other engines, and without xllamacpp.
        run: How to run it.
    """

    plan: Plan
    out: Path
    saved: Path
    check: EngineCheck | None
    run: str


def check_in_llama_cpp(
    file: Path, saved: Path, original: Path | None, progress: ProgressCallback
) -> EngineCheck | None:
    """Load a GGUF file in llama.cpp, and compare its losses with those of the weights that were chosen.

    Args:
        file: The file.
        saved: Folder of the saved model that the file was made of.
        original: GGUF file of the model in full precision, which writes a text too if it fits into memory.
        progress: Told of every request.
    Returns:
        None where the package is not installed.
    Raises:
        ExportError: If llama.cpp does not load the file, or computes other losses.
    """
    try:
        engine = f"llama.cpp by {_PACKAGE} {version(_PACKAGE)}"
    except PackageNotFoundError:
        return None
    model, tokenizer = load(saved, device="cpu"), read_tokenizer(saved, None)
    tokens = np.array([tokenizer.encode(_PASSAGE)], dtype=np.int64)
    positions = np.unique(np.linspace(1, tokens.shape[1] - 1, _N_PREFIXES, dtype=int))
    ours = token_losses(model, tokens, "the saved model")[positions - 1]
    server = _server(file, tokens.shape[1])
    wanted: dict[str, Any] = {"max_tokens": 1}
    if (end := _end(model)) is not None:
        wanted["logit_bias"] = [[end, _BIAS]]
    found = _losses(server, tokens[0], positions, wanted, model.config.get_text_config().vocab_size, progress)
    difference = float(np.abs(found - ours).mean())
    if not difference <= _MOST:
        raise ExportError(
            f"{engine} computes other losses of {file} ({found.mean():.3f} nats a token) than the weights that were "
            f"chosen ({ours.mean():.3f}); report the model's class, and do not use the file"
        )
    (text, *speed), before = _written(server), None
    del server
    n_bytes = 0 if original is None else sum(part.stat().st_size for part in gguf_shards(original))
    if original is not None and n_bytes < (free_memory("cpu") or 0) // 2:
        server = _server(original, tokens.shape[1])
        before, full_speed = _written(server)
        speed.append(full_speed)
        del server
    return EngineCheck(engine, float(found.mean()), float(ours.mean()), text, before, tuple(speed))


def _server(file: Path, length: int) -> Any:
    """A server of llama.cpp in this process.

    Raises:
        ExportError: If llama.cpp does not load the file.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = max(256, 2 * length)
    parameters.verbosity = 0  # its log would stand between the progress and the result
    try:
        return xllamacpp.Server(parameters)
    except RuntimeError as error:
        raise ExportError(f"llama.cpp does not load {file}: {error}") from error


def _written(server: Any) -> tuple[str, float]:
    """What a server writes after the prompt, with the prompt, and tokens per second."""
    answer = server.handle_completions({"prompt": _PROMPT, "max_tokens": _MOST_TOKENS, "temperature": 0.0})
    return _PROMPT + str(answer["choices"][0]["text"]), float(answer["timings"]["predicted_per_second"])


def _losses(
    server: Any,
    sequence: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    wanted: Mapping[str, Any],
    vocabulary: int,
    progress: ProgressCallback,
) -> Losses:
    """Loss of the tokens at some positions of a sequence, shape (n_positions,), nats.

    Raises:
        ExportError: If llama.cpp gives no score of a token.
    """
    losses = []
    for done, position in enumerate(positions):
        progress("checking in llama.cpp", done, len(positions))
        for most in (_LIKELY, vocabulary):  # an answer with the whole vocabulary takes a second
            prompt = {"prompt": sequence[:position].tolist(), **wanted, "logprobs": most}
            answer = server.handle_completions(prompt)
            content = answer["choices"][0]["logprobs"]["content"]
            scores = content[0]["top_logprobs"] if content else []
            found = [-score["logprob"] for score in scores if score["id"] == sequence[position]]
            if found:
                break
        if not found:
            raise ExportError(
                f"llama.cpp gives no score of token {sequence[position]} after {position} tokens; report the model's "
                "class, and do not use the file"
            )
        losses.append(found[0])
    progress("checking in llama.cpp", len(positions), len(positions))
    return np.array(losses)


def _end(model: Any) -> int | None:
    """A token that ends a text; None for a model without one."""
    ends = [model.generation_config.eos_token_id, getattr(model.config.get_text_config(), "eos_token_id", None)]
    end = next((end for end in ends if end is not None), None)
    return end[0] if isinstance(end, list) else end
