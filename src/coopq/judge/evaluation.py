"""One model judged on held-out text: perplexity, and the divergence from the original."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coopq.core.errors import Mismatch
from coopq.core.files import atomic_file, checksum, expanded, locked, require_writable
from coopq.core.specs import Request
from coopq.core.types import ProgressCallback, silent
from coopq.export.checkpoint import SavedModel, load
from coopq.game.prepared import Prepared, prepare
from coopq.judge.divergence import Scores, summarize, token_scores
from coopq.judge.results import Evaluation
from coopq.judge.windows import portions
from coopq.model.load import LoadedModel, config_positions, fingerprint_weights, max_positions, positions_of
from coopq.model.memory import weights_fit
from coopq.model.offload import OffloadedBlocks
from coopq.model.safetensors_io import load_tensors, save_tensors
from coopq.model.sources.folder import read_tokenizer
from coopq.model.texts import HeldOut, TokenSet
from coopq.plan.plan import Plan

_log = logging.getLogger(__name__)
_WINDOW = 2048
"""Tokens of a window in most reports of perplexity."""
NO_REFERENCE = "none"
"""What a user names instead of an original that is not there."""


def window_length(source: str) -> int:
    """Tokens of a window if nobody says how many: 2048, or the positions of a model that has fewer.

    Args:
        source: A model as in `coopq.model.load.load_model`, or the folder of a saved model.
    """
    saved = SavedModel(expanded(source))
    return shortened(config_positions(saved.config) if saved.exists else positions_of(source))


def shortened(positions: int | None) -> int:
    """Tokens of a window for a model of so many positions; None for no limit."""
    positions = positions or _WINDOW
    if positions < _WINDOW:
        _log.info("windows of %d tokens instead of %d: the model has no more positions", positions, _WINDOW)
    return min(positions, _WINDOW)


def evaluate_model(
    source: str,
    text: HeldOut,
    *,
    reference: str | None = None,
    device: str = "auto",
    progress: ProgressCallback = silent,
) -> Evaluation:
    """How well a model predicts a text, and how far the model is from another.

    Args:
        source: The model, as in `coopq.model.load.load_model`.
        text: The text.
        reference: The model that divergences are measured from; None measures none.
        device: Where to compute.
        progress: Told of every batch.
    """
    text.check()
    prepared, loaded = _load_whole(source, device, text, progress)
    original = None if reference is None else _load_whole(reference, device, text, progress)[1].model
    tokens = text.windows(loaded.tokenizer, max_positions(loaded.model))
    parts = []
    for scores in token_scores(loaded.model, tokens.tokens, original):
        parts.append(scores)
        progress("evaluating", sum(len(part["nll"]) for part in parts), len(tokens.tokens))
    n_bytes = sum(player.n_weights for player in prepared.players) * loaded.checkpoint_dtype.itemsize
    return summary(parts, tokens, loaded.source_bytes, n_bytes)


def evaluate_saved(
    folder: Path,
    run: Path,
    text: HeldOut,
    *,
    reference: str | None = None,
    device: str = "auto",
    progress: ProgressCallback = silent,
) -> Evaluation:
    """How well a saved model predicts a text, and how far the model is from the original.

    Args:
        folder: The saved model.
        run: Run folder that keeps what is measured; an interrupted evaluation goes on.
        text: The text.
        reference: Where the original is now; None looks where the plan says, `NO_REFERENCE` measures no divergence.
        device: Where to compute.
        progress: Told of every batch.
    Raises:
        Mismatch: If the plan was made for another model than the reference.
    """
    text.check()
    saved, model = SavedModel(folder), load(folder, device=device)
    original = None
    if reference != NO_REFERENCE:
        original = load_original(saved.plan, reference, device, text, progress)
    tokenizer = read_tokenizer(folder, getattr(model.get_input_embeddings(), "num_embeddings", None))
    tokens, judged = text.windows(tokenizer, max_positions(model)), _Judged(saved, model, original)
    parts: list[Scores] = []
    require_writable(run / "evaluation")
    with locked(run):
        for portion in portions(model, tokens):
            done = sum(len(part["nll"]) for part in parts)
            parts.append(judged.scores(portion, run / "evaluation", done, len(tokens.tokens), progress))
    form = saved.plan.request.target.form
    if form is None or saved.plan.deployment is not None:
        file_bytes, n_bytes = (folder / saved.backend.weights_file).stat().st_size, saved.n_bytes()
    else:
        file_bytes, n_bytes = saved.plan.file_bytes, saved.plan.bytes
    return summary(parts, tokens, file_bytes, n_bytes)


def summary(parts: Iterable[Scores], tokens: TokenSet, file_bytes: int, n_bytes: int) -> Evaluation:
    """The evaluation that scores of all windows make.

    Args:
        parts: Scores of the windows, in order.
        tokens: The windows.
        file_bytes: Bytes of the files that hold the weights.
        n_bytes: Bytes of the players' weights.
    """
    scores = _together(parts)
    nll = float(scores["nll"].mean(dtype=np.float64))
    return Evaluation(nll, tokens.n_scored, file_bytes, n_bytes, tokens.describe(), summarize(scores))


@dataclass(frozen=True)
class _Judged:
    """A saved model beside its original; `original` is None where divergences are not wanted."""

    saved: SavedModel
    model: Any
    original: LoadedModel | None

    def scores(self, portion: TokenSet, folder: Path, done: int, total: int, progress: ProgressCallback) -> Scores:
        """Scores of a portion of a text, kept in a file.

        Args:
            portion: The portion.
            folder: Folder of the file.
            done: Windows of the portions before.
            total: Windows of the whole text.
            progress: Told of every batch.
        """
        about = {
            "model": self.saved.fingerprint(),
            "original": "" if self.original is None else self.saved.plan.fingerprint["weights"],
            "tokens": portion.fingerprint,
            "device": self.model.device.type,
        }
        original = None if self.original is None else self.original.model

        def judged(done_here: int) -> None:
            progress("evaluating the saved model", done + done_here, total)

        return kept_scores(folder, about, lambda: token_scores(self.model, portion.tokens, original), judged)


def kept_scores(
    folder: Path, about: dict[str, str], measure: Callable[[], Iterable[Scores]], judged: Callable[[int], None]
) -> Scores:
    """Scores of a text, read from a file of an evaluation or measured and kept there.

    Args:
        folder: Folder of the file.
        about: What the scores depend on.
        measure: Measures the scores, a batch of windows at a time.
        judged: Told of the number of windows measured so far.
    """
    file = folder / f"scores-{checksum(about)}.safetensors"
    if file.exists():
        kept = load_tensors(file, way_out="delete the file to measure again", about=about)
        return {name: tensor.numpy() for name, tensor in kept.items()}
    parts: list[Scores] = []
    for scores in measure():
        parts.append(scores)
        judged(sum(len(part["nll"]) for part in parts))
    found = _together(parts)
    with atomic_file(file) as temporary:
        save_tensors({name: torch.from_numpy(score) for name, score in found.items()}, temporary, about)
    return found


def _together(parts: Iterable[Scores]) -> Scores:
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _load_whole(
    source: str, device: str, text: HeldOut, progress: ProgressCallback, dtype: str = "auto"
) -> tuple[Prepared, LoadedModel]:
    """A model in full precision; its blocks stay on the host where they do not fit on the device."""
    one_window = {"tokens": text.length, "sequence_length": text.length}
    prepared = prepare(Request.from_options(model=source, device=device, dtype=dtype, **one_window))
    # Nothing is quantized here, so the weights need no room for a bank.
    must_offload = not weights_fit(source, dtype=dtype, device=device)
    loaded = prepared.load(progress, on_host=must_offload)
    if must_offload:
        OffloadedBlocks(loaded.model, prepared.device)
    return prepared, loaded


def load_original(
    plan: Plan, reference: str | None, device: str, text: HeldOut, progress: ProgressCallback
) -> LoadedModel:
    """The model that a plan was made for.

    Raises:
        Mismatch: If the reference is another model.
    """
    source = reference or plan.request.model.source
    _, loaded = _load_whole(source, device, text, progress, plan.fingerprint["dtype"])
    found, expected = fingerprint_weights(loaded.model), plan.fingerprint["weights"]
    if found != expected:
        raise Mismatch(
            f"the plan was made for another model than {source!r}",
            {"weights": found},
            {"weights": expected},
            f"name the plan's model with --reference, or measure no divergence with --reference {NO_REFERENCE}",
        )
    return loaded
