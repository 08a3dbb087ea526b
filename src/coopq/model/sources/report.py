"""Compares a loaded model with its files: missing weights and wrong shapes are refused, unused tensors are named."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from coopq.core.errors import ModelError, first_names
from coopq.model.sources.stored import ReadLog

_HARMLESS = re.compile(r"(rotary_emb\.inv_freq|(^|\.)position_ids|\.(attn|attention)\.(masked_)?bias)$")
"""Buffers that old checkpoints store, and that models compute by themselves. Source: `modeling_utils.py`."""
_SCALE_LIKE = re.compile(r"(scales?|scale_inv|zeros|zero_points?|absmax|codebooks?)$")
"""Tensors that quantized weights come with."""


def check_report(source: str, report: Mapping[str, Any], stored: Collection[str], log: ReadLog) -> tuple[str, ...]:
    """Check what transformers reports about loading.

    Args:
        source: The model's name, for errors.
        report: Missing, mismatched and unexpected keys.
        stored: Names of the stored tensors.
        log: What was read of them.
    Returns:
        What a user should know, one sentence each.
    Raises:
        ModelError: If weights are missing, have another shape, are not finite, or are quantized.
    """
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {source!r} lacks {len(missing)} of the weights that its config.json describes "
            f"({first_names(missing)}), and they would be random; correct config.json, or download the weights again"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise ModelError(
            f"model {source!r} holds {len(mismatched)} weights of another shape than its config.json describes "
            f"({name}: {tuple(found)} in the file, {tuple(expected)} expected); correct config.json, or download the "
            "weights again"
        )
    if report.get("error_msgs"):
        raise ModelError(f"model {source!r} cannot be read ({report['error_msgs'][0]}); download the weights again")
    if log.not_finite:
        names = sorted(log.not_finite)
        raise ModelError(
            f"model {source!r} holds values that are not finite in {len(names)} tensors ({first_names(names)}); "
            "download the weights again"
        )
    unused = sorted(name for name in stored if name not in log.read and not _HARMLESS.search(name))
    if scales := [name for name in unused if _SCALE_LIKE.search(name)]:
        raise ModelError(
            f"model {source!r} holds {len(scales)} scales of quantized weights ({first_names(scales)}) that would be "
            "ignored; give the checkpoint in 16 or 32 bits"
        )
    if not unused:
        return ()
    return (f"{len(unused)} tensors of the files are not used and not saved: {first_names(unused)}",)
