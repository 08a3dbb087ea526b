"""Quantized models on disk: packed weights as safetensors, everything else as JSON.

    quantized.safetensors   packed weights of the players, 16 bits of each untouched weight, and all other weights as
                            they were; with gptq, which has a form of its own, the file is model.safetensors
    plan.json               width of each module, and how to read the packed weights
    config.json, tokenizer  as transformers writes them

transformers does not look for the name quantized.safetensors, so it cannot load packed weights by mistake.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from coopq.core.errors import ModelError, PlanError
from coopq.core.files import atomic_folder, read_json, write_json
from coopq.core.types import Player, ProgressCallback, silent
from coopq.export.stored_tensors import stored_tensors
from coopq.game.prefix_engine import model_nll
from coopq.game.session import Session
from coopq.model.load import LoadedModel, empty_model, pick_device, pick_dtype
from coopq.model.players import weight_of
from coopq.model.safetensors_io import save_tensors
from coopq.model.texts import TokenSet
from coopq.plan.plan import Plan
from coopq.quantizers.backend import Backend
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.packed_modules import PackedWeights, install


@dataclass(frozen=True)
class SavedModel:
    """A folder that `save_model` wrote.

    Attributes:
        folder: The folder.
    """

    folder: Path

    @property
    def exists(self) -> bool:
        """Whether the folder holds a saved model."""
        return (self.folder / "plan.json").is_file() and (self.folder / "config.json").is_file()

    @cached_property
    def plan(self) -> Plan:
        """The plan of the model.

        Raises:
            ModelError: If the folder holds no saved model.
        """
        if not self.exists:
            raise ModelError(
                f"{self.folder} holds no model saved by coopq; `coopq quantize` and `coopq apply` write such models"
            )
        return Plan.load(self.folder / "plan.json")

    @cached_property
    def backend(self) -> Backend:
        """The backend that packed the weights."""
        return PackedWeights(self.plan.quantizer).backend

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
    """

    loaded: LoadedModel
    players: Sequence[Player]
    backend: Backend
    fitting: TokenSet | None = None
    calibration: TokenSet | None = None
    bank: WeightBank | None = None

    @classmethod
    def from_session(cls, session: Session) -> "Source":
        """What the model of an open session is saved from."""
        return cls(
            loaded=session.loaded,
            players=session.players,
            backend=session.backend,
            fitting=session.fitting,
            calibration=session.calibration,
            bank=session.bank,
        )


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
    """
    _check_modules(source, plan)
    tensors = _packed_tensors(source, plan, progress)
    unpacked = stored_tensors(source.loaded.model, plan.modules, source.loaded.checkpoint_dtype)
    tensors |= {name: tensor.contiguous().cpu() for name, tensor in unpacked}
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        _write(source, plan, tensors, folder)
        if source.backend.whole_model:
            plan = plan.replace(saved_loss=_saved_loss(source, folder))
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
        ModelError: If the folder holds no such model, or the weights do not fit the plan.
    """
    saved, target = SavedModel(Path(path)), pick_device(device)
    plan, folder = saved.plan, saved.folder
    dtype = pick_dtype(plan.fingerprint["dtype"], target, torch.float32)
    packed, unpacked = saved.read()
    model = empty_model(AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype)
    try:
        wrong = _load_tensors(model, unpacked, packed)
        model.to(target)
        if not wrong:
            install(model, packed, plan.quantized, target, dtype)
    except (RuntimeError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(
            f"{folder} does not fit its plan and configuration ({reason}); save the model again"
        ) from error
    if wrong:
        raise ModelError(
            f"{folder / saved.backend.weights_file} lacks, or should not hold, {', '.join(wrong)}; save the model again"
        )
    return model.eval()


def _check_modules(source: Source, plan: Plan) -> None:
    """Check that a plan names the modules of the players.

    Raises:
        PlanError: If not.
    """
    modules = {linear.name for player in source.players for linear in player.linears}
    if differing := plan.modules.keys() ^ modules:
        raise PlanError(f"the plan and the model differ in {', '.join(sorted(differing))}; allocate it again")


def _packed_tensors(source: Source, plan: Plan, progress: ProgressCallback) -> dict[str, Tensor]:
    """The packed tensors of all quantized modules, by their names in the file.

    Raises:
        PlanError: If the tensors take other bytes than the plan says.
    """
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
        raise PlanError(f"quantized weights take {n_bytes} bytes, and the plan says {planned}; allocate it again")
    return tensors


def _write(source: Source, plan: Plan, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write all files of a saved model."""
    model, backend = source.loaded.model, source.backend
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    source.loaded.tokenizer.save_pretrained(folder)
    save_tensors(tensors, folder / backend.weights_file)
    native = backend.native_config(plan.modules)
    if native is not None:  # the library's own loader recognises the folder by these
        write_json(folder / "quantize_config.json", native)
        write_json(folder / "config.json", read_json(folder / "config.json") | {"quantization_config": native})
    plan.save(folder / "plan.json")


def _saved_loss(source: Source, folder: Path) -> float:
    """Negative log-likelihood of a saved model on the calibration tokens, nats per token."""
    assert source.calibration is not None, "backends with whole_model need the calibration tokens"
    model = load(folder, device=source.loaded.model.device.type)
    return float(np.concatenate(list(model_nll(model, source.calibration.tokens))).mean())


def _load_tensors(model: Any, tensors: Mapping[str, Tensor], packed: Iterable[str]) -> list[str]:
    """Load all tensors but the packed ones.

    Args:
        model: The model.
        tensors: The tensors by name.
        packed: Names of the modules whose weights are packed.
    Returns:
        Names of the tensors that are missing or too many.
    """
    keys = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    state = model.state_dict(keep_vars=True)
    given = {id(state[name]) for name in tensors if name in state}
    given |= {id(weight_of(model, name)) for name in packed}
    return [name for name in keys.missing_keys if id(state[name]) not in given] + list(keys.unexpected_keys)
