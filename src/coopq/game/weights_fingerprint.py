"""What quantized weights depend on."""

from typing import TYPE_CHECKING, Any

import torch

from coopq.model.load import LoadedModel, fingerprint_weights
from coopq.model.matrices import round_untouched
from coopq.model.players import covered_share
from coopq.model.texts import TokenSet

if TYPE_CHECKING:  # the session imports this module
    from coopq.game.prepared import Prepared


def fingerprint_and_round(prepared: "Prepared", loaded: LoadedModel, fitting: TokenSet | None) -> dict[str, Any]:
    """Round weights that stay untouched to 16 bits, in place; returns what quantized weights depend on.

    The hash of the weights is that of the checkpoint, so it is taken before they are rounded.
    """
    widths = prepared.request.widths
    weights = {
        "weights": fingerprint_weights(loaded.model),
        "players": {"granularity": widths.granularity, "embeddings": widths.embeddings, "routers": widths.routers},
        "covered": round(covered_share(loaded.model, prepared.players), 4),
        "backend": prepared.backend.fingerprint(),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": prepared.device.type,
    }
    if loaded.notes:
        weights["source"] = list(loaded.notes)
    if fitting is not None:
        weights["fitted to"] = fitting.fingerprint
    if round_untouched(loaded, prepared.players, widths.bits):
        weights["rounded to"] = "bfloat16" if loaded.checkpoint_dtype == torch.bfloat16 else "float16"
    return weights
