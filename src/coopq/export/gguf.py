"""GGUF files for llama.cpp: a full-precision GGUF of the model, with the plan's types in the players' places.

What is not a player, tokenizer and settings come from that base as they are, so that every architecture that
llama.cpp's own converter writes can be exported.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.quantize import Backend, get_backend
from coopq.quantize.ggml.types import GGMLBackend
from coopq.export.checkpoint import read_saved, saved_plan
from coopq.core.errors import ExportError, Mismatch
from coopq.export.base_model import load_source
from coopq.core.files import atomic_file, require_space
from coopq.model.load import gguf_file
from coopq.plan.plan import Plan
from coopq.model.players import weight_of
from coopq.core.config import RunConfig
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width, silent

_TYPE_KEY, _VERSION_KEY = "general.file_type", "general.quantization_version"


def export_gguf(
    saved: Path, out: Path, *, base: Path | None = None, model: str | None = None, progress: ProgressCallback = silent
) -> int:
    """Write a saved model as a GGUF file; it appears whole or not at all.

    Args:
        saved: A model saved with the backend ggml, ggml-iq or ggml-gptq.
        out: The file to write, or to write over.
        base: The model in full precision as GGUF; None where the plan's model is a GGUF file itself.
        model: Where the plan's model is now; None takes the plan's word.
        progress: Told of every tensor.
    Returns:
        Bytes of the file, which are those that `predicted_bytes` foretells.
    Raises:
        ExportError: If the saved model is of another backend, or there is no base.
        Mismatch: If the base is not the plan's model.
    """
    import gguf

    plan = _plan(saved)
    backend = _ggml(plan.quantizer)
    assert backend is not None
    reader = _reader(plan, base, model)
    modules = {tensor.name: name for tensor, name in _tensors(reader, plan.modules)}
    n_tensors = Counter(modules.values())
    size = _size(plan, reader)
    out.parent.mkdir(parents=True, exist_ok=True)
    require_space(out.parent, size, str(out))
    loaded = load_source(plan, model, progress)
    packed, _ = read_saved(saved)
    with atomic_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, _text(reader, "general.architecture"))
        writer.data_alignment = reader.alignment
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in ("general.architecture", _TYPE_KEY, _VERSION_KEY):
                continue  # what the writer says itself
            kind = field.types[0]
            sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
        writer.add_file_type(gguf.LlamaFileType.GUESSED)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for done, tensor in enumerate(reader.tensors):
            progress("writing", done, len(reader.tensors))
            data, kind = tensor.data, tensor.tensor_type
            if tensor.name in modules:
                name = modules[tensor.name]
                weight = weight_of(loaded.model, name).data.flatten(0, -2)
                order = _row_order(tensor, weight, name, n_tensors[name])
                if not _stays(tensor, plan.modules[name]):
                    kind = backend.tensor_type(int(tensor.shape[0]), plan.modules[name])
                    rows = packed[name]["blocks"] if name in packed else weight.half()
                    data = rows.cpu().numpy()[order].reshape(*tensor.data.shape[:-1], -1)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written = temporary.stat().st_size
        assert written == size, (written, size)
    progress("writing", len(reader.tensors), len(reader.tensors))
    return size


def predicted_bytes(plan: Plan, *, base: Path | None = None, model: str | None = None) -> int:
    """Bytes of the file that a plan will be exported to, from the base and the plan alone.

    Args and errors: as for `export_gguf`.
    """
    return _size(plan, _reader(plan, base, model))


def _size(plan: Plan, reader: Any) -> int:
    """Bytes of a plan's file over a base."""
    backend = get_backend(**plan.quantizer)
    sizes = {
        tensor.name: _bytes(tensor, backend, plan.modules[name]) for tensor, name in _tensors(reader, plan.modules)
    }
    return _beside(reader, sizes) + sum(_padded(size, reader.alignment) for size in sizes.values())


def _stays(tensor: Any, bits: Width) -> bool:
    """Whether a tensor of the base goes into the file as it is: one of 32 bits is rounded to 16."""
    import gguf

    return bits == UNTOUCHED and tensor.tensor_type != gguf.GGMLQuantizationType.F32


def _bytes(tensor: Any, backend: Backend, bits: Width) -> int:
    """Bytes of a tensor of the base at a width."""
    if _stays(tensor, bits):
        return int(tensor.n_bytes)
    return backend.storage_bytes((int(np.prod(tensor.shape[1:])), int(tensor.shape[0])), bits)


def untouched_bytes(config: RunConfig, players: Sequence[Player]) -> tuple[int, ...]:
    """Bytes that each player takes where it is left untouched, shape (n_players,).

    Args and errors: as for `fixed_bytes`.
    """
    reader, backend = _base_reader(config), get_backend(**config.quantizer)
    player_of = {linear.name: index for index, player in enumerate(players) for linear in player.linears}
    sizes = [0] * len(players)
    for tensor, name in _tensors(reader, list(player_of)):
        sizes[player_of[name]] += _bytes(tensor, backend, UNTOUCHED)
    return tuple(sizes)


def _base_reader(config: RunConfig) -> Any:
    import gguf

    return gguf.GGUFReader(_base(None if config.base is None else Path(config.base), config.model))


def fixed_bytes(config: RunConfig, modules: Sequence[str]) -> int:
    """Bytes of a file beside the players' own, at most: these are padded to a multiple each.

    Raises:
        ExportError: If the backend is not ggml's, there is no base, or it has no tensor for a module.
    """
    if _ggml(config.quantizer) is None:
        raise ExportError(
            f"GGUF files hold ggml's types, not those of {config.backend!r}; add --backend ggml, ggml-iq or ggml-gptq"
        )
    reader = _base_reader(config)
    tensors = [tensor.name for tensor, _ in _tensors(reader, modules)]
    return _beside(reader, tensors) + len(tensors) * (reader.alignment - 1)


def _beside(reader: Any, quantized: Collection[str]) -> int:
    """Bytes of the head of the file and of the tensors that stay as they are."""
    head = 24  # magic, version, and the numbers of tensors and keys
    for key in (_TYPE_KEY, _VERSION_KEY):
        head += 8 + len(key) + 4 + 4
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in (_TYPE_KEY, _VERSION_KEY):
            head += sum(part.nbytes for part in field.parts)
    head += sum(part.nbytes for tensor in reader.tensors for part in tensor.field.parts)
    others = (tensor for tensor in reader.tensors if tensor.name not in quantized)
    return _padded(head, reader.alignment) + sum(_padded(int(tensor.n_bytes), reader.alignment) for tensor in others)


def _plan(saved: Path) -> Plan:
    """The plan of a saved model that ggml quantized."""
    plan = saved_plan(saved)
    if _ggml(plan.quantizer) is None:
        raise ExportError(
            f"{saved} was quantized by {plan.quantizer['name']!r}, and GGUF files hold ggml's types; search with "
            f"--backend ggml, or deploy the plan with it: coopq apply {saved / 'plan.json'} --backend ggml --out FOLDER"
        )
    return plan


def _ggml(quantizer: Mapping[str, Any]) -> GGMLBackend | None:
    """The backend of these settings if it is ggml's."""
    backend = get_backend(**quantizer)
    return backend if isinstance(backend, GGMLBackend) else None


def _base(base: Path | None, source: str) -> Path:
    """The GGUF file to start from."""
    found = base or gguf_file(source)
    if found is None:
        raise ExportError(
            f"model {source!r} is no GGUF file; name one of it in full precision with --base: llama.cpp's "
            "convert_hf_to_gguf.py writes it"
        )
    if not found.is_file():
        raise ExportError(f"there is no file {found}; name a GGUF file of the model in full precision with --base")
    return found


def _text(reader: Any, key: str) -> str:
    return str(reader.fields[key].contents())


def _reader(plan: Plan, base: Path | None, model: str | None) -> Any:
    """The base of a plan, opened."""
    import gguf

    config = RunConfig.from_json(plan.config)
    named = base or (None if config.base is None else Path(config.base))
    return gguf.GGUFReader(_base(named, model or config.model))


def _tensors(reader: Any, modules: Collection[str]) -> list[tuple[Any, str]]:
    """The tensors of modules in the file, each with the name of its module.

    Experts have one, or two where transformers keeps gates and ups together and llama.cpp does not.

    Raises:
        ExportError: If a module has none of its own.
    """
    import gguf

    architecture = _text(reader, "general.architecture")
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    n_blocks = int(reader.fields[f"{architecture}.block_count"].contents())
    names = gguf.get_tensor_name_map(kinds[architecture], n_blocks)
    there = {tensor.name: tensor for tensor in reader.tensors}
    found = []
    for module in modules:
        experts = module.removesuffix(".gate_up_proj") if module.endswith(".experts.gate_up_proj") else None
        for part in (module,) if experts is None else (f"{experts}.gate_proj", f"{experts}.up_proj"):
            name = names.get_name(f"{part}.weight", try_suffixes=(".weight",))
            if name not in there:
                raise ExportError(
                    f"{part} has no tensor of its own in the GGUF file ({name or 'no name is known for it'}); models "
                    "that llama.cpp stores in another form cannot be exported"
                )
            found.append((there[name], module))
    return found


def _row_order(tensor: Any, weight: Tensor, name: str, n_tensors: int) -> npt.NDArray[np.intp]:
    """Which row of a weight each row of the base's tensor is: llama.cpp orders those of some projections anew.

    Equal rows have equal blocks: any of them will do.

    Args:
        tensor: The base's.
        weight: The model's, shape (rows, columns).
        name: Of its module.
        n_tensors: How many of the base hold the module, each with as many rows.
    Raises:
        Mismatch: If the rows are others.
    """
    import gguf

    theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type) + np.float32(0)  # no negative zeros
    theirs = theirs.reshape(-1, theirs.shape[-1])
    narrow = {gguf.GGMLQuantizationType.F16: torch.float16, gguf.GGMLQuantizationType.BF16: torch.bfloat16}
    dtype = narrow.get(tensor.tensor_type, torch.float32)
    ours = weight.detach().cpu().to(dtype).float().numpy() + np.float32(0)
    if np.array_equal(ours, theirs):
        return np.arange(len(ours))
    if ours.shape == (n_tensors * len(theirs), theirs.shape[1]):
        places = {row.tobytes(): index for index, row in enumerate(ours)}
        order = np.array([places.get(row.tobytes(), -1) for row in theirs])
        if order.min() >= 0:
            return order
    raise Mismatch(
        f"{tensor.name} of the GGUF file is not {name} of the model",
        {"rows": ours.shape},
        {"rows": theirs.shape},
        "name a GGUF file of the very same weights, unquantized, with --base",
    )


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
