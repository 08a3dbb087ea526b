"""How far a model's predictions are from the original's: scores of every token, and statistics with intervals."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from coopq.core.errors import EstimationError
from coopq.game.losses import Reference, portions_scores
from coopq.judge.results import Divergence, Estimate
from coopq.model.blockwise import logit_bytes, whole_size
from coopq.model.kernels.cpu import onednn_forwards
from coopq.model.kernels.forward import override_forward
from coopq.model.texts import require_known_tokens

Scores = dict[str, npt.NDArray[np.float32]]
"""Scores of each scored token by their names in `coopq.game.losses.TokenScores`, each of shape (n_windows, length - 1).
Without an original there is only "nll"."""
_N_RESAMPLES = 1000


@torch.no_grad()
def token_scores(model: Any, tokens: npt.NDArray[np.int64], original: Any = None) -> Iterator[Scores]:
    """Scores of each token but the first of each window, by forwards of two models, a batch at a time.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        tokens: Shape (n_windows, length).
        original: The model that predictions are compared with; None compares with none.
    Yields:
        Scores of the next windows.
    Raises:
        EstimationError: If a score is not finite, or the models predict other tokens.
    """
    require_known_tokens(model, tokens)
    ids = torch.from_numpy(tokens)
    vocabulary = model.config.get_text_config().vocab_size
    models = [one for one in (model, original) if one is not None]
    fast = {key: value for one in models if one.device.type == "cpu" for key, value in onednn_forwards(one).items()}
    for batch in ids.split(whole_size(model.device.type, tokens.shape[1], vocabulary)):
        with override_forward(fast):
            logits, *reference = (
                one(input_ids=batch.to(one.device), use_cache=False).logits[:, :-1].flatten(0, 1) for one in models
            )
        scores = compare_logits(logits, batch[:, 1:].flatten().to(logits.device), *reference)
        yield {name: score.reshape(len(batch), -1) for name, score in scores.items()}


@torch.no_grad()
def compare_logits(logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> Scores:
    """Scores of each position, a few positions at a time: copies of the logits of all would take much memory.

    Args:
        logits: Shape (n, vocabulary).
        targets: The next tokens, shape (n,).
        reference: Logits of the original, shape (n, vocabulary).
    Returns:
        Scores of shape (n,).
    Raises:
        EstimationError: As `token_scores`.
    """
    if reference is not None and reference.shape != logits.shape:
        raise EstimationError(
            f"the model predicts {logits.shape[1]} tokens and its reference {reference.shape[1]}; name the model's own "
            "original with --reference"
        )
    size = max(1, logit_bytes(logits.device.type) // (4 * logits.shape[1]))
    parts: list[list[Tensor]] = []
    for at in range(0, len(logits), size):
        rows = slice(at, at + size)
        if reference is None:
            parts.append([functional.cross_entropy(logits[rows].float(), targets[rows], reduction="none")])
        else:
            original = Reference.from_logits([(0, reference[rows].to(logits.device))])
            parts.append([*portions_scores([(0, logits[rows])], original, targets[rows])])
    names = ("nll", "divergence", "same_top")
    found = [torch.cat(part).float().cpu().numpy() for part in zip(*parts, strict=True)]
    if not all(np.isfinite(score).all() for score in found):
        raise EstimationError("the model's predictions are not finite on some tokens; compute in float32")
    return dict(zip(names, found, strict=False))


def summarize(scores: Scores) -> Divergence | None:
    """Statistics of all tokens; None without an original."""
    if "divergence" not in scores:
        return None
    statistics: dict[str, Callable[[Any], Any]] = {
        "mean": np.mean,
        "median": np.median,
        "percentile_99": lambda values: np.quantile(values, 0.99),
        "maximum": np.max,
    }
    windows = scores["divergence"].astype(np.float64)
    found = {name: estimate(windows, statistic) for name, statistic in statistics.items()}
    return Divergence(**found, same_top=estimate(scores["same_top"].astype(np.float64)))


def estimate(windows: npt.NDArray[np.float64], statistic: Callable[[Any], Any] = np.mean) -> Estimate:
    """A statistic with its 95 % interval: windows are drawn anew with replacement, all tokens of a window together.

    Args:
        windows: Shape (n_windows, ...).
        statistic: Returns one number.
    """
    from scipy.stats import bootstrap  # slow to import

    value, index = float(statistic(windows)), np.arange(len(windows))
    if len(windows) == 1:
        return Estimate(value, None)
    result = bootstrap(
        (index,),
        lambda drawn: statistic(windows[drawn]),
        vectorized=False,
        n_resamples=_N_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return Estimate(value, (float(result.confidence_interval.low), float(result.confidence_interval.high)))
