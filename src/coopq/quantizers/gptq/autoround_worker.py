"""Quantizes a model with auto-round, started by `coopq.quantizers.gptq.subprocess_job`.

python -m coopq.quantizers.gptq.autoround_worker FOLDER

Private parts of auto-round in use: the attributes `scale` and `zp` of quantized layers.
"""

import json
import sys
from pathlib import Path
from typing import Any

from coopq.core.types import UNTOUCHED
from coopq.quantizers.gptq.subprocess_job import DONE, end_with_parent

_BATCH = 8
"""Sequences of a step, the library's default."""


def main(folder: Path) -> None:
    """Quantize FOLDER/model as FOLDER/request.json asks; writes a file for each layer."""
    import torch
    from auto_round import AutoRound
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    from coopq.model.sources.classes import model_class

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    out = folder / "out"
    out.mkdir()
    kind = model_class(AutoConfig.from_pretrained(folder / "model"))
    model = kind.from_pretrained(folder / "model", dtype=getattr(torch, request["dtype"]))
    tokens = request["tokens"]
    quantizer = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder / "model"),
        bits=min(request["bits"].values()),
        layer_config={name: _scheme(width) for name, width in request["bits"].items()},
        dataset=[torch.tensor([sequence]) for sequence in tokens],
        nsamples=len(tokens),
        seqlen=len(tokens[0]),
        batch_size=min(_BATCH, len(tokens)),
        device_map=request["device"],
        amp=request["dtype"] != "float32",  # mixed precision turns all weights into bfloat16
        enable_torch_compile=False,
        **request["settings"],
    )
    quantized, _ = quantizer.quantize()
    for name, width in request["bits"].items():
        module = quantized.get_submodule(name)
        if width != UNTOUCHED and hasattr(module, "scale"):
            save_file(_solved(module, request["settings"]["group_size"]), out / f"{name}.safetensors")
    (out / DONE).touch()


def _scheme(width: int) -> dict[str, Any]:
    """The library's words for a width."""
    return {"bits": width} if width != UNTOUCHED else {"bits": UNTOUCHED, "data_type": "fp"}


def _solved(module: Any, group_size: int) -> dict[str, Any]:
    """The tensors that `coopq.quantizers.gptq.format.pack_weight` takes, of a quantized layer."""
    import torch

    rows, columns = module.weight.shape
    scales = module.scale.reshape(rows, -1)
    zeros = torch.as_tensor(module.zp).reshape(-1).expand(scales.numel()).reshape(rows, -1)
    solved = {
        "weight": module.weight.data,
        "scales": scales.float(),
        "zeros": zeros.float(),
        "g_idx": torch.arange(columns) // group_size,
    }
    return {part: tensor.cpu().contiguous() for part, tensor in solved.items()}


if __name__ == "__main__":
    end_with_parent(Path(sys.argv[1]))
    main(Path(sys.argv[1]))
