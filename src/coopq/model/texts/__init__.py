"""Texts, and the token sequences that are made of them."""

from coopq.model.texts.documents import WIKITEXT2
from coopq.model.texts.token_sets import (
    HeldOut,
    TokenSet,
    calibration_set,
    check_length,
    check_text,
    fitting_set,
    require_known_tokens,
)

__all__ = [
    "WIKITEXT2",
    "HeldOut",
    "TokenSet",
    "calibration_set",
    "check_length",
    "check_text",
    "fitting_set",
    "require_known_tokens",
]
