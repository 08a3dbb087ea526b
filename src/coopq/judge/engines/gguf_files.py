"""GGUF files judged by llama.cpp itself: perplexity, and the divergence from the file that a file was made from."""

from pathlib import Path

import torch

from coopq.core.errors import BackendError
from coopq.core.types import ProgressCallback, silent
from coopq.judge.divergence import Scores, compare_logits
from coopq.judge.engines.llama_cpp import LlamaCppTokenizer, llama_cpp_log_probabilities, llama_cpp_package
from coopq.judge.evaluation import shortened, summary
from coopq.judge.results import Evaluation
from coopq.model.sources.gguf import gguf_shards
from coopq.model.sources.gguf_header import read_header
from coopq.model.texts import HeldOut


def gguf_window_length(*files: Path) -> int:
    """Tokens of a window if nobody says how many: 2048, or the context of a model that has less."""
    return shortened(_context(*files))


def _context(*files: Path) -> int | None:
    """The smallest context of models, in tokens; None if no file names one."""
    lengths = []
    for file in files:
        settings = read_header(file).settings
        architecture = settings.get("general.architecture")
        found = None if architecture is None else settings.get(f"{architecture.value}.context_length")
        if found is not None and isinstance(found.value, int):
            lengths.append(found.value)
    return min(lengths, default=None)


def evaluate_gguf(file: Path, reference: Path, text: HeldOut, progress: ProgressCallback = silent) -> Evaluation:
    """How well a GGUF file predicts a text, and how far its predictions are from another file's, by llama.cpp.

    Logits of both models are held for one window at a time. llama.cpp rounds activations to 8 bits.

    Args:
        file: The file.
        reference: The file that divergences are measured from: the model in full precision.
        text: The text, in tokens of the reference.
        progress: Told of every window.
    Raises:
        BackendError: If no package of llama.cpp is installed, or it cannot read a file.
        CalibrationError: If the text has no window, or windows are longer than the context of a model.
        EstimationError: If the files predict other tokens.
    """
    text.check()
    llama_cpp_package()
    try:
        windows = text.windows(LlamaCppTokenizer(reference), _context(file, reference))
        ids, parts = torch.from_numpy(windows.tokens), []
        n_threads = torch.get_num_threads()
        predicted = (llama_cpp_log_probabilities(one, windows.tokens, n_threads) for one in (file, reference))
        for done, (own, original) in enumerate(zip(*predicted, strict=True)):
            progress("evaluating by llama.cpp", done, len(ids))
            scores = compare_logits(torch.from_numpy(own), ids[done, 1:], torch.from_numpy(original))
            parts.append(Scores({name: score[None] for name, score in scores.items()}))
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"llama.cpp cannot compute {file} beside {reference} ({error}); check both files") from error
    progress("evaluating by llama.cpp", len(ids), len(ids))
    n_bytes = sum(path.stat().st_size for path in gguf_shards(file))
    return summary(parts, windows, n_bytes, n_bytes)
