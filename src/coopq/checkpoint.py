"""Quantized models on disk: packed weights as safetensors, everything else as JSON.

    quantized.safetensors   packed weights of the players, and all other weights as they were
    plan.json               bits of each module, and how to read them
    config.json, tokenizer  as transformers writes them

The weights do not carry the name that transformers looks for, so it cannot load them by mistake.
"""

import hashlib
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from coopq.backends import Backend, get_backend
from coopq.errors import ModelError
from coopq.files import atomic_folder
from coopq.models import LoadedModel, pick_device, pick_dtype
from coopq.plan import Plan
from coopq.tensors import load_tensors, save_tensors
from coopq.types import ProgressCallback, silent

_WEIGHTS = "quantized.safetensors"


def is_saved_model(folder: Path) -> bool:
    """Whether `folder` holds a model saved by `save_model`."""
    return (folder / _WEIGHTS).is_file() and (folder / "plan.json").is_file()


def save_model(
    loaded: LoadedModel, plan: Plan, backend: Backend, out: Path, progress: ProgressCallback = silent
) -> int:
    """Quantize a model by a plan and save it; `out` appears whole or not at all.

    Args:
        loaded: The full-precision model that the plan was made for.
        plan: Bits of each module.
        backend: What quantizes.
        out: A folder that does not exist, or is empty.
        progress: Told of every module.
    Returns:
        Bytes of the quantized tensors, which are the plan's.
    """
    tensors: dict[str, Tensor] = {}
    modules = plan.modules
    for done, (name, bits) in enumerate(modules.items()):
        progress("packing", done, len(modules))
        packed = backend.quantize(loaded.model.get_submodule(name).weight.data, bits)
        tensors.update({f"{name}.{key}": tensor.contiguous().cpu() for key, tensor in packed.items()})
    progress("packing", len(modules), len(modules))
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert n_bytes == plan.bytes, f"{n_bytes} bytes were packed, {plan.bytes} were predicted"
    tensors.update(_untouched(loaded, modules))
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        loaded.model.config.save_pretrained(folder)
        if loaded.model.can_generate():
            loaded.model.generation_config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        save_tensors(tensors, folder / _WEIGHTS)
        plan.save(folder / "plan.json")
    return n_bytes


def load(path: str | Path, *, device: str = "auto") -> Any:
    """Load a model saved by `coopq quantize` or `coopq apply`; its weights stay packed.

    Args:
        path: The folder.
        device: "cpu", "cuda", ..., or "auto".
    Returns:
        A transformers causal language model in evaluation mode.
    Raises:
        ModelError: If the folder holds no such model, or its weights do not fit its plan.
    """
    folder = Path(path)
    if not is_saved_model(folder):
        raise ModelError(f"{folder} holds no model saved by coopq; `coopq quantize` and `coopq apply` write them")
    plan = Plan.load(folder / "plan.json")
    backend = get_backend(**plan.quantizer)
    target = pick_device(device)
    dtype = pick_dtype(plan.fingerprint["dtype"], target, torch.float32)
    with no_init_weights():  # every weight is read from the file
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    tensors = load_tensors(folder / _WEIGHTS)
    packed: dict[str, dict[str, Tensor]] = {name: {} for name in plan.modules}
    for key in list(tensors):
        name, tensor_name = _split(key, packed)
        if name:
            packed[name][tensor_name] = tensors.pop(key).to(target)
    lacking = _load_untouched(model, tensors, packed) + [name for name in packed if not packed[name]]
    if lacking:
        raise ModelError(f"{folder / _WEIGHTS} lacks, or should not hold, {', '.join(lacking)}; save the model again")
    model.to(target)
    for name, bits in plan.modules.items():
        linear = model.get_submodule(name)
        shape = (linear.out_features, linear.in_features)
        model.set_submodule(name, backend.linear(packed[name], shape, bits, linear.bias, dtype))
    return model.eval()


def saved_bytes(folder: Path) -> int:
    """Bytes of the quantized tensors that really lie in a saved model."""
    modules = Plan.load(folder / "plan.json").modules
    return sum(t.nbytes for key, t in load_tensors(folder / _WEIGHTS).items() if _split(key, modules)[0])


def fingerprint_saved(folder: Path) -> str:
    """A hash of a saved model's weights and plan."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (_WEIGHTS, "plan.json"):
        with (folder / name).open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "blake2b").digest())
    return digest.hexdigest()


def _split(key: str, modules: Container[str]) -> tuple[str, str]:
    """The quantized module that a saved tensor belongs to and its name there; ("", key) for all others."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name, rest = ".".join(parts[:end]), ".".join(parts[end:])
        if name in modules and rest != "bias":
            return name, rest
    return "", key


def _untouched(loaded: LoadedModel, modules: dict[str, int]) -> dict[str, Tensor]:
    """All weights but the players', each once, in the checkpoint's dtype where that loses nothing."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in loaded.model.state_dict().items():
        if name.removesuffix(".weight") in modules or (tensor.data_ptr(), tensor.shape) in seen:
            continue
        seen.add((tensor.data_ptr(), tensor.shape))
        narrow = tensor.to(loaded.checkpoint_dtype) if tensor.is_floating_point() else tensor
        lossless = torch.equal(narrow.to(tensor.dtype), tensor)
        tensors[name] = (narrow if lossless else tensor).contiguous().cpu()
    return tensors


def _load_untouched(model: Any, tensors: dict[str, Tensor], modules: Container[str]) -> list[str]:
    """Load all weights but the players'; the names of those that are missing or too many."""
    keys = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    state = model.state_dict()
    given = {state[name].data_ptr() for name in tensors if name in state}
    missing = [name for name in keys.missing_keys if name.removesuffix(".weight") not in modules]
    return [name for name in missing if state[name].data_ptr() not in given] + list(keys.unexpected_keys)
