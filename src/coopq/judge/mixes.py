"""What llama.cpp's own mix of a plan's size would lose: the file that a user of llama.cpp would otherwise make."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coopq.core.errors import ExportError
from coopq.core.files import locked, require_writable
from coopq.core.specs import Request
from coopq.core.types import ProgressCallback
from coopq.export.base_model import BaseModel
from coopq.export.gguf.base import BaseFile
from coopq.export.gguf.form import open_base
from coopq.export.gguf.mixes import mix_bytes, mix_types, nearest_mix
from coopq.export.gguf.names import module_tensors
from coopq.game.prepared import prepare
from coopq.judge.divergence import Scores, estimate, token_scores
from coopq.judge.evaluation import kept_scores, load_original
from coopq.judge.references import MIX
from coopq.judge.results import MOST_NLL, Comparison
from coopq.model.load import max_positions
from coopq.model.matrices import matrix_of
from coopq.model.texts import HeldOut, TokenSet, calibration_set, fitting_set
from coopq.plan.plan import Plan
from coopq.quantizers.ggml.library import from_blocks, to_blocks
from coopq.quantizers.ggml.types import GGMLBackend, GGMLFormat
from coopq.quantizers.packed_modules import PackedWeights

_FORM = "gguf"


def judge_mix(
    plan: Plan, run: Path, text: HeldOut, *, reference: str | None, device: str, progress: ProgressCallback
) -> Comparison | None:
    """llama.cpp's mix whose file is nearest to a plan's, by the same importance of columns, on held-out text.

    Args:
        plan: The plan.
        run: Run folder that keeps what is measured.
        text: The text.
        reference: Where the original is now; None looks where the plan says.
        device: Where to compute.
        progress: Told of every step.
    Returns:
        None if the plan is not for llama.cpp, or llama.cpp's mixes of the model are not known.
    """
    backend = PackedWeights(plan.quantizer).backend
    if plan.request.target.form != _FORM or not isinstance(backend, GGMLBackend):
        return None
    assert isinstance(backend.format, GGMLFormat)
    base = open_base(BaseModel.find(plan.request, source=reference), progress)
    mix = nearest_mix(base, plan.file_bytes)
    if mix is None:
        return None
    original = load_original(plan, reference, device, text, progress)
    types = _module_types(base, plan.request.replace(model=reference or plan.request.model.source), mix)
    if types is None:
        return None
    positions = max_positions(original.model)
    draw = plan.request.text, original.tokenizer, positions
    held_out, calibration = text.windows(*draw[1:]), calibration_set(*draw)
    fitting = fitting_set(*draw) if backend.calibrated else None
    about = {
        "mix": " ".join([mix, backend.version, *map(str, types.items())]),
        "original": plan.fingerprint["weights"],
        "importance": f"{'' if fitting is None else fitting.fingerprint} {backend.settings['importance']}",
        "device": original.model.device.type,
    }

    @cache
    def mixed_model() -> Any:
        mixed = load_original(plan, reference, device, text, progress).model
        importance = backend.column_weights(mixed, list(types), None if fitting is None else fitting.tokens)
        _quantize(mixed, types, importance, progress)
        return mixed

    def scores_on(tokens: TokenSet) -> Scores:
        return kept_scores(
            run / "evaluation",
            {**about, "tokens": tokens.fingerprint},
            lambda: token_scores(mixed_model(), tokens.tokens, original.model),
            lambda done: progress("evaluating the mix", done, len(tokens.tokens)),
        )

    require_writable(run / "evaluation")
    with locked(run):
        scores, on_calibration = scores_on(held_out), scores_on(calibration)
    windows = scores["nll"].mean(axis=1, dtype=np.float64)
    (average_bits, bits_per_weight), loss = _bits(base, mix), plan.request.search.loss
    return Comparison(
        method=MIX,
        budget=mix,
        n=1,
        average_bits=average_bits,
        bits_per_weight=bits_per_weight,
        loss=loss,
        calibration_loss=float(on_calibration["divergence" if loss == "kl" else "nll"].mean(dtype=np.float64)),
        nll=float(windows.mean()),
        perplexity=float(np.exp(min(windows.mean(), MOST_NLL))),
        windows=tuple(windows.tolist()),
        divergence=estimate(scores["divergence"].astype(np.float64)),
        same_top=estimate(scores["same_top"].astype(np.float64)),
        file_bytes=mix_bytes(base, mix_types(base, mix)),
    )


def _module_types(base: BaseFile, request: Request, mix: str) -> dict[str, Any] | None:
    """The type of each module that a mix quantizes; None if a tensor and a module are not each other's alone."""
    by_tensor = mix_types(base, mix)
    players = prepare(request.replace(embeddings=True)).players
    modules = [linear.name for player in players for linear in player.linears]
    try:
        tensors = {tensor.name: module for tensor, module in module_tensors(base, modules)}
    except ExportError:  # llama.cpp stores a module in another form
        return None
    if not by_tensor.keys() <= tensors.keys() or len(set(tensors.values())) < len(tensors):
        return None
    return {tensors[name]: kind for name, kind in by_tensor.items()}


@torch.no_grad()
def _quantize(model: Any, types: Mapping[str, Any], importance: Mapping[str, Any], progress: ProgressCallback) -> None:
    """Round the weights of a model to types, in place."""
    for done, (name, kind) in enumerate(types.items()):
        progress("quantizing the mix", done, len(types))
        matrix = matrix_of(model, name)
        rounded = from_blocks(kind, to_blocks(kind, matrix.rows(), importance.get(name)))
        matrix.parameter.data.copy_(matrix.stored(rounded.to(matrix.parameter.dtype)))
    progress("quantizing the mix", len(types), len(types))


def _bits(base: BaseFile, mix: str) -> tuple[float, float]:
    """Bits of the quantized tensors for each of their weights: by the names of the types, and as stored."""
    from gguf import GGML_QUANT_SIZES

    named = stored = weights = 0
    for name, kind in mix_types(base, mix).items():
        block, size = GGML_QUANT_SIZES[kind]
        n_weights = base.tensors[name].n_rows * base.tensors[name].shape[0]
        named += int(kind.name.lstrip("IQ")[0]) * n_weights
        stored += 8 * size * n_weights // block
        weights += n_weights
    return named / weights, stored / weights
