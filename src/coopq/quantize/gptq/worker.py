"""Quantizes a model with GPTQModel, as `coopq.quantize.gptq.subprocess_job` has it.

python -m coopq.quantize.gptq.worker FOLDER
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from coopq.quantize.gptq.subprocess_job import DONE, end_with_parent

_HESSIAN_BYTES = 4 * 2**30
"""What Hessians may take together before the model runs again for the others."""


def main(folder: Path) -> None:
    """Quantize FOLDER/model as FOLDER/request.json says."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count() or 1))
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    out = folder / "out"
    out.mkdir()
    if "layers" in request:
        statically(request, folder / "model", out)
    else:
        sequentially(request, folder / "model", out)
    (out / DONE).touch()


def sequentially(request: dict[str, Any], source: Path, out: Path) -> None:
    """One layer after the other, each on inputs as those before it make them; saves the library's checkpoint."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    dtype = getattr(torch, request["dtype"])
    model = GPTQModel.load(str(source), QuantizeConfig(**request["settings"], device=request["device"]), dtype=dtype)
    samples = [{"input_ids": sequence, "attention_mask": [1] * len(sequence)} for sequence in request["tokens"]]
    model.quantize(samples, batch_size=1)
    model.save(str(out))


def statically(request: dict[str, Any], source: Path, out: Path) -> None:
    """Each layer by itself at each width, on inputs of the full-precision model; saves a file for each."""
    import torch
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, request["dtype"]))
    model = model.to(request["device"]).eval()
    widths: dict[str, list[int]] = {}
    for width, names in request["layers"].items():
        for name in names:
            widths.setdefault(name, []).append(int(width))

    def task_of(name: str, bits: int) -> Any:
        task = GPTQ(model.get_submodule(name), QuantizeConfig(bits=bits, **request["settings"]))
        task.quantizer.configure(perchannel=True)
        return task

    def listener(task: Any) -> Callable[[Any, Any, Any], None]:
        return lambda _, inputs, output: task.add_batch(inputs[0], output)

    with torch.no_grad():
        for names in _portions({name: model.get_submodule(name).in_features for name in widths}):
            leaders = {name: task_of(name, widths[name][0]) for name in names}
            handles = [model.get_submodule(name).register_forward_hook(listener(leaders[name])) for name in names]
            for sequence in request["tokens"]:
                model.base_model(input_ids=torch.tensor([sequence], device=model.device), use_cache=False)
            for handle in handles:
                handle.remove()
            for name, leader in leaders.items():
                for bits in widths[name]:
                    task = task_of(name, bits)
                    task.adopt_hessian_from(leader)
                    weight, scales, zeros, g_idx, *_ = task.quantize()
                    solved = {"weight": weight, "scales": scales, "zeros": zeros, "g_idx": g_idx}
                    save_file({part: tensor.contiguous().cpu() for part, tensor in solved.items()}, out / "part")
                    (out / "part").rename(out / f"{name}-{bits}.safetensors")
                leader.free()


def _portions(columns: dict[str, int]) -> Iterator[list[str]]:
    """Names of layers whose Hessians fit into memory together."""
    portion: list[str] = []
    n_bytes = 0
    for name, n_columns in columns.items():
        if portion and n_bytes + 4 * n_columns**2 > _HESSIAN_BYTES:
            yield portion
            portion, n_bytes = [], 0
        portion.append(name)
        n_bytes += 4 * n_columns**2
    yield portion


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]))
