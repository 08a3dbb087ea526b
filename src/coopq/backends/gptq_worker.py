"""Quantizes a model with GPTQModel, in a process of its own: python -m coopq.backends.gptq_worker REQUEST.

The library prints a banner, takes over logging and sets environment variables; all of that ends with this process.
"""

import json
import os
import sys
from pathlib import Path


def main(request: dict[str, str]) -> None:
    """Quantize `request["model"]` on `request["tokens"]` and save the checkpoint in `request["out"]`."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count() or 1))
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    tokens = json.loads(Path(request["tokens"]).read_text(encoding="utf-8"))
    settings = json.loads(Path(request["settings"]).read_text(encoding="utf-8"))
    model = GPTQModel.load(request["model"], QuantizeConfig(**settings), dtype=getattr(torch, request["dtype"]))
    samples = [{"input_ids": sequence, "attention_mask": [1] * len(sequence)} for sequence in tokens]
    model.quantize(samples, batch_size=1)
    model.save(request["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
