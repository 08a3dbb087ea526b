"""Quantized models on disk: packed weights as safetensors, everything else as JSON.

quantized.safetensors   packed weights of the players, 16 bits of each untouched weight, and all other weights as
                        they were; with gptq, which has a form of its own, the file is model.safetensors
plan.json               width of each module, and how to read the packed weights
config.json, tokenizer  as transformers writes them
hashes.json             hashes of the configuration and the tokenizer
README.md, LICENSE ...  a model card, and what the source says of itself
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from coopq.core.errors import ModelError, OutOfMemory, PlanError
from coopq.core.files import atomic_folder, expanded, read_json, write_json
from coopq.core.types import Player, ProgressCallback, silent
from coopq.export.folders.folder_files import copy_source_files, require_unchanged, write_hashes, write_model_card
from coopq.export.folders.stored_tensors import load_stored, saved_config, stored_tensors
from coopq.export.verification import (
    assigned_weights,
    last_line,
    loss_of,
    measured_weights,
    probe_tokens,
    require_equal,
    token_losses,
)
from coopq.game.session import Session
from coopq.model.load import LoadedModel, empty_model, pick_device, pick_dtype
from coopq.model.matrices import matrix_of
from coopq.model.memory import free_memory
from coopq.model.safetensors_io import require_finite, save_tensors
from coopq.model.texts import TokenSet
from coopq.plan.plan import Plan
from coopq.quantizers.backend import Backend
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.packed_modules import ABOUT, PackedWeights, install

_log = logging.getLogger(__name__)
_SHARE_OF_FREE = 0.8
"""Most of the free memory that dequantized weights may take; activations and a KV cache need the rest."""


@dataclass(frozen=True)
class SavedModel:
    """A folder that `save_model` wrote."""

    folder: Path

    @property
    def exists(self) -> bool:
        """Whether the folder holds a saved model."""
        return (self.folder / "plan.json").is_file() and (self.folder / "config.json").is_file()

    @cached_property
    def plan(self) -> Plan:
        """The plan of the model.

        Raises:
            ModelError: If the folder holds no saved model, or the configuration or the tokenizer was changed.
        """
        if not self.exists:
            raise ModelError(
                f"{self.folder} holds no model saved by coopq; `coopq quantize` and `coopq apply` write such models"
            )
        require_unchanged(self.folder)
        return Plan.load(self.folder / "plan.json")

    @cached_property
    def backend(self) -> Backend:
        """The backend that packed the weights."""
        return PackedWeights(self.plan.quantizer).backend

    @cached_property
    def config(self) -> Any:
        """The configuration of the model; a ModelError if it, or the tokenizer, was changed."""
        require_unchanged(self.folder)
        return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)

    def read(self) -> tuple[PackedWeights, dict[str, Tensor]]:
        """The packed weights, and all other tensors by name.

        Raises:
            OutputError: If the weights cannot be read.
        """
        return PackedWeights.read(self.folder, self.plan.quantizer, self.plan.quantized)

    def n_bytes(self) -> int:
        """Bytes of the players' tensors on disk."""
        packed, unpacked = self.read()
        untouched = self.plan.modules.keys() - packed.keys()
        tensors = [tensor for parts in packed.values() for tensor in parts.values()]
        tensors += [tensor for key, tensor in unpacked.items() if key.removesuffix(".weight") in untouched]
        return sum(tensor.nbytes for tensor in tensors)

    def fingerprint(self) -> str:
        """A hash of the weights, the plan and the configuration."""
        digest = hashlib.blake2b(digest_size=16)
        weights = sorted(self.folder.glob("*.safetensors"))
        for path in (*weights, self.folder / "plan.json", self.folder / "config.json"):
            with path.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "blake2b").digest())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a saved model is made from.

    Attributes:
        loaded: The model in full precision that the plan was made for.
        players: The model's players.
        backend: What quantizes.
        fitting: Tokens that weights are fitted to; None for backends that fit none.
        calibration: Tokens that searches see; backends with `whole_model` need them.
        bank: Where the packed weights are, if they are made; None lets the backend quantize.
        reused: Whether the model is used after it was saved; its own weights are freed otherwise.
    """

    loaded: LoadedModel
    players: Sequence[Player]
    backend: Backend
    fitting: TokenSet | None = None
    calibration: TokenSet | None = None
    bank: WeightBank | None = None
    reused: bool = True

    @classmethod
    def from_session(cls, session: Session) -> "Source":
        """What the model of an open session is saved from."""
        names = ("loaded", "players", "backend", "fitting", "calibration", "bank")
        return cls(**{name: getattr(session, name) for name in names})


def save_model(source: Source, plan: Plan, out: Path, progress: ProgressCallback = silent) -> Plan:
    """Quantize a model by a plan and save the model; `out` appears whole or not at all.

    Args:
        source: The model, and what quantizes it.
        plan: Width of each module.
        out: A folder that does not exist, or is empty.
        progress: Told of every module.
    Returns:
        The plan as saved. Backends with `whole_model` make other weights for a mixed model than those that were
        measured, so for these backends the plan has the loss of the saved model on the calibration tokens.
    Raises:
        PlanError: If the plan and the model have other modules, or the plan says other sizes than the weights take.
        ModelError: If a weight is not finite, or the saved model cannot compute, or computes another loss than the
            model with the assigned weights.
    """
    if differing := plan.modules.keys() ^ {linear.name for player in source.players for linear in player.linears}:
        raise PlanError(
            f"the plan and the model differ in {', '.join(sorted(differing))}; repeat the command that made the plan"
        )
    tensors = _packed_tensors(source, plan, progress)
    unpacked = stored_tensors(source.loaded.model, plan.modules, source.loaded.checkpoint_dtype)
    tensors |= {name: tensor.contiguous().cpu() for name, tensor in unpacked}
    masks = dict(source.loaded.model.named_buffers())  # buffers hold infinity on purpose
    written = (item for item in tensors.items() if item[0] not in masks)
    require_finite(written, "the model to save", "choose another --backend, or mend the checkpoint")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        _write(source, plan, tensors, folder)
        n_bytes = (folder / source.backend.weights_file).stat().st_size
        whole = plan.file_bytes if plan.request.target.form else n_bytes
        plan = _checked(source, plan, folder, progress)
        plan = plan.replace(file_bytes=whole, source_bytes=source.loaded.source_bytes)
        plan.save(folder / "plan.json")
        write_model_card(plan, folder, "coopq", n_bytes)
    return plan


def load(path: str | Path, *, device: str = "auto", dequantize: bool | None = None) -> Any:
    """Load a model saved by `coopq quantize` or `coopq apply`.

    Args:
        path: The folder.
        device: "cpu", "cuda", ..., or "auto".
        dequantize: True gives ordinary layers with dequantized weights: the speed and the memory of the original.
            False keeps weights packed, in little memory, and dequantizes each weight in each forward pass: text is
            generated slowly. None dequantizes where the weights have room. The values are the same.
    Returns:
        A transformers causal language model in evaluation mode.
    Raises:
        ModelError: If the folder holds no such model, or the weights do not fit the plan.
    """
    saved, target = SavedModel(expanded(path)), pick_device(device)
    plan, folder = saved.plan, saved.folder
    dtype = pick_dtype(plan.fingerprint["dtype"], target, torch.float32)
    packed, unpacked = saved.read()
    model = empty_model(saved.config, dtype)
    if dequantize is None:
        free = free_memory(device)
        dequantize = free is None or sum(tensor.nbytes for tensor in model.parameters()) <= _SHARE_OF_FREE * free
        if not dequantize:
            _log.warning("%s: weights stay packed, as memory is short: text is generated slowly", folder)
    try:
        wrong = load_stored(model, unpacked, packed)
        model.to(target)
        if not wrong:
            install(model, packed, plan.quantized, target, dtype, dequantize=dequantize)
        if (folder / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{folder} does not fit into the memory of {target} ({last_line(error)}); use the device cpu"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder} does not fit its plan ({last_line(error)}); save the model again") from error
    if wrong:
        file = folder / saved.backend.weights_file
        raise ModelError(f"{file} lacks, or should not hold, {', '.join(wrong)}; save the model again")
    return model.eval()


def dequantized(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The weights that the quantized modules of a saved model compute with; errors as for `load`.

    Yields:
        Name of each parameter as in the original model, and its weight in the parameter's own shape and orientation,
        in the dtype of the model that was measured.
    """
    model = load(folder, device="cpu", dequantize=True)
    parameters = {id(matrix_of(model, name).parameter) for name in SavedModel(expanded(folder)).plan.quantized}
    yield from ((name, weight.data) for name, weight in model.named_parameters() if id(weight) in parameters)


def _packed_tensors(source: Source, plan: Plan, progress: ProgressCallback) -> dict[str, Tensor]:
    """The packed tensors of all quantized modules, by their names in the file; refused if they take other bytes."""
    backend, loaded, widths = source.backend, source.loaded, plan.quantized
    progress("packing", 0, len(widths))
    packed: Iterable[tuple[str, Mapping[str, Tensor]]] = ()
    if source.bank is not None and not backend.whole_model:
        packed = source.bank.packed(widths)
    elif widths:
        tokens = None if source.fitting is None else source.fitting.tokens
        packed = backend.quantize_model(loaded.model, loaded.tokenizer, widths, tokens)
    tensors: dict[str, Tensor] = {}
    for done, (name, parts) in enumerate(packed, start=1):
        tensors |= {f"{name}.{part}": tensor.contiguous().cpu() for part, tensor in parts.items()}
        progress("packing", done, len(widths))
    n_bytes, planned = sum(tensor.nbytes for tensor in tensors.values()), plan.bytes - plan.untouched_bytes
    if n_bytes != planned:
        raise PlanError(
            f"quantized weights take {n_bytes} bytes, and the plan says {planned}; repeat the command that made it"
        )
    return tensors


def _write(source: Source, plan: Plan, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write all files of a saved model."""
    model, backend = source.loaded.model, source.backend
    saved_config(model, source.loaded.checkpoint_dtype).save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    source.loaded.tokenizer.save_pretrained(folder)
    save_tensors(tensors, folder / backend.weights_file, ABOUT)
    if (native := backend.native_config(plan.modules)) is not None:  # the library's own loader reads these
        write_json(folder / "quantize_config.json", native)
        write_json(folder / "config.json", read_json(folder / "config.json") | {"quantization_config": native})
    copy_source_files(source.loaded.folder, folder)
    write_hashes(folder)
    plan.save(folder / "plan.json")


def _checked(source: Source, plan: Plan, folder: Path, progress: ProgressCallback) -> Plan:
    """The plan of a saved model that computes what the plan's weights compute; with the saved loss if that is new."""
    progress("checking the saved model", 0, 1)
    model, device = source.loaded.model, source.loaded.model.device
    tokens = probe_tokens(model, source.calibration)
    if source.bank is None or source.backend.whole_model:
        packed, _ = PackedWeights.read(folder, plan.quantizer, plan.quantized)
        assigned = assigned_weights(model, packed, plan.quantized, restore=source.reused)
    else:
        assigned = measured_weights(source.bank, plan.assignment)
    with assigned:
        expected = token_losses(model, tokens, "the model with the weights of the plan")
    try:
        saved = load(folder, device=device.type, dequantize=False)
        found = token_losses(saved, tokens, "the saved model")
    except (OutOfMemory, torch.OutOfMemoryError):  # the accelerator holds the model that was measured
        saved = load(folder, device="cpu", dequantize=False)
        found = token_losses(saved, tokens, "the saved model")
    require_equal(found, expected, model.dtype, f"the saved {type(model).__name__}", ModelError)
    if source.backend.whole_model:
        assert source.calibration is not None, "backends with whole_model need the calibration tokens"
        plan = plan.replace(saved_loss=loss_of(saved, source.calibration.tokens, "the saved model"))
    progress("checking the saved model", 1, 1)
    return plan
