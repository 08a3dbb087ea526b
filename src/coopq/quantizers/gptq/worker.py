"""Quantizes a model with GPTQModel, started by `coopq.quantizers.gptq.subprocess_job`.

python -m coopq.quantizers.gptq.worker FOLDER

`_Solvers` holds all private parts of GPTQModel that are in use.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coopq.quantizers.gptq.subprocess_job import DONE, end_with_parent
from coopq.quantizers.sizes import in_portions

_HESSIAN_BYTES = 4 * 2**30
"""Memory for Hessians; the model runs once for as many layers as have room."""


def main(folder: Path) -> None:
    """Quantize FOLDER/model as FOLDER/request.json asks."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count() or 1))
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    out = folder / "out"
    out.mkdir()
    if "layers" in request:
        quantize_static(request, folder / "model", out)
    else:
        quantize_in_order(request, folder / "model", out)
    (out / DONE).touch()


def quantize_in_order(request: dict[str, Any], source: Path, out: Path) -> None:
    """Quantize one layer after the other, each on inputs that the quantized layers before it make.

    The result is the library's own checkpoint.
    """
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    dtype = getattr(torch, request["dtype"])
    model = GPTQModel.load(str(source), QuantizeConfig(**request["settings"], device=request["device"]), dtype=dtype)
    samples = [{"input_ids": sequence, "attention_mask": [1] * len(sequence)} for sequence in request["tokens"]]
    model.quantize(samples, batch_size=1)
    model.save(str(out))


def quantize_static(request: dict[str, Any], source: Path, out: Path) -> None:
    """Quantize each layer by itself at each width, on inputs of the full-precision model.

    The result is a file for each layer and width, with the tensors that `coopq.quantizers.gptq.format.pack_weight`
    takes.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from coopq.model.players import body_of
    from coopq.model.sources.classes import model_class

    solvers = _Solvers(request["settings"])
    model = model_class(AutoConfig.from_pretrained(source)).from_pretrained(
        source, dtype=getattr(torch, request["dtype"])
    )
    model = model.to(request["device"]).eval()
    layers = {name: model.get_submodule(name) for names in request["layers"].values() for name in names}
    widths = {name: [int(width) for width, names in request["layers"].items() if name in names] for name in layers}
    with torch.no_grad():
        for names in in_portions({name: 4 * layer.in_features**2 for name, layer in layers.items()}, _HESSIAN_BYTES):
            observers = {name: solvers.make(layers[name], widths[name][0]) for name in names}
            handles = [layers[name].register_forward_hook(solvers.hook(observers[name])) for name in names]
            for sequence in request["tokens"]:
                body_of(model)(input_ids=torch.tensor([sequence], device=model.device), use_cache=False)
            for handle in handles:
                handle.remove()
            for name, observer in observers.items():
                for bits in widths[name]:
                    solved = solvers.solve(solvers.make(layers[name], bits), observer)
                    save_file({part: tensor.contiguous().cpu() for part, tensor in solved.items()}, out / "part")
                    (out / "part").rename(out / f"{name}-{bits}.safetensors")
                observer.free()


class _Solvers:
    """GPTQModel's private solvers of single layers.

    Args:
        settings: The library's configuration of all layers.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from gptqmodel import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ

        self._kind, self._config, self._settings = GPTQ, QuantizeConfig, settings

    def make(self, layer: Any, bits: int) -> Any:
        """A solver of a layer at a width."""
        solver = self._kind(layer, self._config(bits=bits, **self._settings))
        solver.quantizer.configure(perchannel=True)
        return solver

    def hook(self, observer: Any) -> Callable[[Any, Any, Any], None]:
        """A forward hook that adds the inputs of a layer to a solver's Hessian."""
        return lambda _, inputs, output: observer.add_batch(inputs[0], output)

    def solve(self, solver: Any, observer: Any) -> dict[str, Any]:
        """A layer quantized by a solver, with the Hessian of another solver."""
        solver.adopt_hessian_from(observer)
        weight, scales, zeros, g_idx, *_ = solver.quantize()
        return {"weight": weight, "scales": scales, "zeros": zeros, "g_idx": g_idx}


if __name__ == "__main__":
    end_with_parent(Path(sys.argv[1]))
    main(Path(sys.argv[1]))
