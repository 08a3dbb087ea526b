"""Quantized models on disk: packed weights as safetensors, everything else as JSON.

    quantized.safetensors   packed weights of the players, 16 bits of those left untouched, and all other weights as
                            they were; model.safetensors where the form is the library's own, as with gptq
    plan.json               bits of each module, and how to read them
    config.json, tokenizer  as transformers writes them

quantized.safetensors is not a name that transformers looks for, so it cannot load packed weights by mistake.
"""

import dataclasses
import hashlib
import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from coopq.quantize import Backend, get_backend
from coopq.quantize.backend import Packed, PackedEmbedding, PackedExperts
from coopq.game.prefix_engine import model_nll
from coopq.core.errors import ModelError, PlanError
from coopq.core.files import atomic_folder, write_json
from coopq.model.load import LoadedModel, pick_device, pick_dtype
from coopq.plan.plan import Plan
from coopq.model.players import find_ends, find_players, weight_of
from coopq.core.config import RunConfig
from coopq.model.safetensors_io import load_tensors, save_tensors
from coopq.core.types import ProgressCallback, silent


def is_saved_model(folder: Path) -> bool:
    """Whether `folder` holds a model saved by `save_model`."""
    return (folder / "plan.json").is_file() and (folder / "config.json").is_file()


def save_model(
    loaded: LoadedModel,
    plan: Plan,
    backend: Backend,
    fitting: npt.NDArray[np.int64] | None,
    out: Path,
    progress: ProgressCallback = silent,
    *,
    calibration: npt.NDArray[np.int64] | None = None,
    packed: Iterable[tuple[str, Packed]] | None = None,
) -> Plan:
    """Quantize a model by a plan and save it; `out` appears whole or not at all.

    Args:
        loaded: The full-precision model that the plan was made for.
        plan: Bits of each module.
        backend: What quantizes.
        fitting: Tokens that weights are fitted to, by backends that do, shape (n_sequences, length).
        out: A folder that does not exist, or is empty.
        progress: Told of every module.
        calibration: Tokens that searches see, shape (n_sequences, length).
        packed: Its quantized weights by name, where they have been made; otherwise they are made.
    Returns:
        The plan as saved: for backends whose mixed weights are not the bank's, with the loss of what was saved on the
        calibration tokens.
    Raises:
        PlanError: If the plan names other modules than the model has, or other sizes than they take.
    """
    tensors: dict[str, Tensor] = {}
    modules = plan.modules
    known = {linear.name for player in find_players(loaded.model) for linear in player.linears}
    if RunConfig.from_json(plan.config).embeddings:
        known |= {end.name for end in find_ends(loaded.model)}
    if set(modules) != known:
        raise PlanError(
            f"the plan and the model differ in {', '.join(sorted(set(modules) ^ known))}; allocate it again"
        )
    quantized = plan.quantized
    progress("packing", 0, len(quantized))
    if packed is None:
        packed = backend.quantize_model(loaded.model, loaded.tokenizer, quantized, fitting) if quantized else ()
    for done, (name, of_name) in enumerate(packed, start=1):
        tensors.update({f"{name}.{key}": tensor.contiguous().cpu() for key, tensor in of_name.items()})
        progress("packing", done, len(quantized))
    kept = {name for name in modules if name not in quantized}
    n_bytes, planned = sum(tensor.nbytes for tensor in tensors.values()), plan.bytes - plan.untouched_bytes
    if n_bytes != planned:
        raise PlanError(f"quantized weights take {n_bytes} bytes, and the plan says {planned}; allocate it again")
    tensors.update(_untouched(loaded, quantized, kept))
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        loaded.model.config.save_pretrained(folder)
        if loaded.model.can_generate():
            loaded.model.generation_config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        save_tensors(tensors, folder / backend.weights_file)
        _add_native_config(folder, backend.native_config(modules))
        plan.save(folder / "plan.json")
        if backend.whole_model:
            assert calibration is not None
            losses = np.concatenate(list(model_nll(load(folder, device=loaded.model.device.type), calibration)))
            plan = dataclasses.replace(plan, saved_loss=float(losses.mean()))
            plan.save(folder / "plan.json")
    return plan


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
    plan = saved_plan(folder)
    backend = get_backend(**plan.quantizer)
    target = pick_device(device)
    dtype = pick_dtype(plan.fingerprint["dtype"], target, torch.float32)
    with no_init_weights():  # every weight is read from the file
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype=dtype
        )
    packed, tensors = read_saved(folder)
    try:
        lacking = _load_untouched(model, tensors, packed)
        model.to(target)
        for name, bits in plan.quantized.items() if not lacking else ():
            weight = weight_of(model, name)
            shape = (weight[..., 0].numel(), weight.shape[-1])
            if sum(tensor.nbytes for tensor in packed[name].values()) != backend.storage_bytes(shape, bits):
                raise KeyError(f"the tensors of {name} are not those of {bits} bits")
            there = {key: tensor.to(target) for key, tensor in packed.pop(name).items()}
            if weight.dim() > 2:
                owner, _, attribute = name.rpartition(".")
                PackedExperts(backend, there, weight.shape, bits, dtype).serve(model.get_submodule(owner), attribute)
                continue
            linear = model.get_submodule(name)
            if isinstance(linear, nn.Embedding):
                if (head := model.get_output_embeddings()).weight is linear.weight:
                    model.set_output_embeddings(backend.linear(there, shape, bits, head.bias, dtype))
                model.set_submodule(name, PackedEmbedding(linear, backend, there, bits, dtype))
            else:
                model.set_submodule(name, backend.linear(there, shape, bits, linear.bias, dtype))
    except (RuntimeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(
            f"{folder} does not fit its plan and configuration ({reason}); save the model again"
        ) from error
    if lacking:
        raise ModelError(
            f"{folder / backend.weights_file} lacks, or should not hold, {', '.join(lacking)}; save the model again"
        )
    return model.eval()


def saved_plan(folder: Path) -> Plan:
    """The plan of a saved model.

    Raises:
        ModelError: If the folder holds no such model.
    """
    if not is_saved_model(folder):
        raise ModelError(f"{folder} holds no model saved by coopq; `coopq quantize` and `coopq apply` write them")
    return Plan.load(folder / "plan.json")


def read_saved(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A saved model's packed tensors, by module and then by their names there, and all that are not packed."""
    plan = saved_plan(folder)
    weights_file = folder / get_backend(**plan.quantizer).weights_file
    tensors = load_tensors(weights_file, way_out="save the model again")
    packed: dict[str, dict[str, Tensor]] = {name: {} for name in plan.quantized}
    for key in list(tensors):
        name, tensor_name = _split(key, packed)
        if name:
            packed[name][tensor_name] = tensors.pop(key)
    return packed, tensors


def saved_bytes(folder: Path) -> int:
    """Bytes of the players' tensors that really lie in a saved model."""
    packed, others = read_saved(folder)
    kept = saved_plan(folder).modules.keys() - packed.keys()
    n_bytes = sum(tensor.nbytes for of in packed.values() for tensor in of.values())
    return n_bytes + sum(tensor.nbytes for name, tensor in others.items() if name.removesuffix(".weight") in kept)


def fingerprint_saved(folder: Path) -> str:
    """A hash of a saved model's weights, plan and configuration."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (*sorted(folder.glob("*.safetensors")), folder / "plan.json", folder / "config.json"):
        with path.open("rb") as handle:
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


def _untouched(loaded: LoadedModel, quantized: Iterable[str], kept: Iterable[str]) -> dict[str, Tensor]:
    """All weights but the quantized, each once, in the checkpoint's dtype where that loses nothing.

    Args:
        loaded: The model.
        quantized: Modules that are packed.
        kept: Players' modules that stay as they are; 16 bits are stored of them.
    """
    tensors: dict[str, Tensor] = {}
    state = loaded.model.state_dict()
    seen = {(weight.data_ptr(), weight.shape) for weight in (weight_of(loaded.model, name) for name in quantized)}
    halved = {weight_of(loaded.model, name).data_ptr() for name in kept}
    for name, tensor in state.items():
        if (tensor.data_ptr(), tensor.shape) in seen:
            continue
        seen.add((tensor.data_ptr(), tensor.shape))
        narrow = tensor.to(loaded.checkpoint_dtype) if tensor.is_floating_point() else tensor
        if tensor.data_ptr() in halved and narrow.dtype.itemsize > 2:
            narrow = tensor.half()
        if tensor.data_ptr() not in halved and not torch.equal(narrow.to(tensor.dtype), tensor):
            narrow = tensor
        tensors[name] = narrow.contiguous().cpu()
    return tensors


def _add_native_config(folder: Path, native: dict[str, Any] | None) -> None:
    """Let the library's own loader recognise the checkpoint."""
    if native is None:
        return
    write_json(folder / "quantize_config.json", native)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"quantization_config": native})


def _load_untouched(model: Any, tensors: dict[str, Tensor], modules: Iterable[str]) -> list[str]:
    """Load all weights but the players'; the names of those that are missing or too many."""
    keys = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    state = model.state_dict()
    given = {state[name].data_ptr() for name in tensors if name in state}
    given |= {weight_of(model, name).data_ptr() for name in modules}
    missing = keys.missing_keys
    return [name for name in missing if state[name].data_ptr() not in given] + list(keys.unexpected_keys)
