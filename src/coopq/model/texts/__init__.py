"""Texts, and the token sequences that are made of them."""

from coopq.model.texts.documents import PACKAGED, WIKITEXT2
from coopq.model.texts.token_sets import (
    HeldOut,
    TokenSet,
    calibration_set,
    check_length,
    check_text,
    fitting_set,
    is_gone,
    require_known_tokens,
)

__all__ = [
    "PACKAGED",
    "WIKITEXT2",
    "HeldOut",
    "TokenSet",
    "calibration_set",
    "check_length",
    "check_text",
    "fitting_set",
    "is_gone",
    "require_known_tokens",
]
