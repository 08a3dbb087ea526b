"""GPTQ and AutoRound, by their libraries."""
