"""GPTQ and AutoRound: libraries that quantize whole models into GPTQ's tensor format."""
