"""Saved models in the forms that engines load: one file for each form."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coopq.quantize import Backend
from coopq.quantize.bank import measure_storage
from coopq.core.errors import ExportError, hint
from coopq.export.hf_folder import Layout, check_backend, check_columns, fixed_bytes, folder_bytes
from coopq.plan.plan import Plan
from coopq.core.config import RunConfig
from coopq.core.sizes import Storage
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, silent

FORMS = ("gguf", "openvino", "compressed-tensors", "auto-round")
"""Their sizes are known before they are written."""


def export_model(
    saved: Path,
    form: str,
    out: Path,
    *,
    base: Path | None = None,
    model: str | None = None,
    progress: ProgressCallback = silent,
) -> int:
    """Write a saved model in the form of an engine.

    Args:
        saved: Folder of the saved model.
        form: One of `FORMS`.
        out: The file, or for the others the folder.
        base: For "gguf" and "openvino": the model in full precision in that form.
        model: For these: where the plan's model is now.
        progress: Told of every step.
    Returns:
        Bytes of the file that holds the weights.
    Raises:
        ExportError: If the form is unknown, or cannot hold the model.
    """
    if form == "gguf":
        from coopq.export.gguf import export_gguf

        return export_gguf(saved, out, base=base, model=model, progress=progress)
    if form == "openvino":
        from coopq.export.openvino import export_openvino

        return export_openvino(saved, out, base=base, model=model, progress=progress)
    if form not in FORMS:
        raise ExportError(f"form {form!r} is unknown; {hint(form, FORMS)}")
    if base is not None or model is not None:
        raise ExportError(f"--base and --model are for gguf and openvino; {form} takes all from the saved model")
    if form == "compressed-tensors":
        from coopq.export.compressed_tensors import export_compressed_tensors

        return export_compressed_tensors(saved, out, progress=progress)
    from coopq.export.auto_round import export_auto_round

    return export_auto_round(saved, out, progress=progress)


def predicted_bytes(plan: Plan, form: str, *, base: Path | None = None, model: str | None = None) -> int:
    """Bytes of the file that holds the weights of a plan in the form of an engine, before it is written.

    Args: as for `export_model`.
    Raises:
        ExportError: If the form is unknown, or cannot hold the model.
    """
    if form == "gguf":
        from coopq.export import gguf

        return gguf.predicted_bytes(plan, base=base, model=model)
    if form == "openvino":
        from coopq.export import openvino

        return openvino.predicted_bytes(plan, base=base, model=model)
    return folder_bytes(plan, form, _layout(form), model=model)


def _layout(form: str) -> Layout:
    """Shapes of the tensors of a form."""
    from coopq.export import auto_round, compressed_tensors

    layouts = {"compressed-tensors": compressed_tensors.layout, "auto-round": auto_round.layout}
    if form not in layouts:
        raise ExportError(f"form {form!r} is unknown; {hint(form, FORMS)}")
    return layouts[form]


def storage_for(config: RunConfig, model: Any, players: Sequence[Player], backend: Backend) -> Storage:
    """Sizes of the players, and what else budgets in bytes have to hold; what the target cannot hold is refused.

    Args:
        config: With the target, if there is one.
        model: The model, or its skeleton.
        players: Its players.
        backend: What quantizes.
    Raises:
        BackendError: If a layer's shape cannot be quantized.
        ExportError: If the target is unknown, or cannot hold what the backend makes of the model.
    """
    storage, fixed = measure_storage(players, backend, config.widths), 0
    if config.target == "gguf":
        from coopq.export import gguf

        fixed = gguf.fixed_bytes(config, [linear.name for player in players for linear in player.linears])
        if UNTOUCHED in config.widths:
            as_in_base = gguf.untouched_bytes(config, players)
            storage = replace(storage, n_bytes={**storage.n_bytes, UNTOUCHED: as_in_base})
    elif config.target == "openvino":
        from coopq.export import openvino

        openvino.check_affine(backend)
        _check_columns(players, backend, config.target)
        fixed = openvino.fixed_bytes(config, players, backend)
    elif config.target in FORMS:
        from coopq.export.compressed_tensors import check_fused

        gptq = check_backend(backend, config.target)
        if config.target == "compressed-tensors":
            check_fused({linear.name: i for i, player in enumerate(players) for linear in player.linears})
        _check_columns(players, backend, config.target)
        fixed = fixed_bytes(config, model, players, gptq, _layout(config.target))
    elif config.target is not None:
        raise ExportError(f"target {config.target!r} is unknown; {hint(config.target, FORMS)}")
    return replace(storage, fixed=fixed + cache_bytes(model, config.context or 0))


def _check_columns(players: Sequence[Player], backend: Backend, form: str) -> None:
    """Check that rows of every layer are whole groups."""
    for linear in (linear for player in players for linear in player.linears):
        check_columns(linear.name, linear.shape[1], backend.settings["group_size"], form)


def cache_bytes(model: Any, context: int) -> int:
    """Bytes of a KV cache of 16 bits, at most: sliding windows need less."""
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * 2 * int(text.num_hidden_layers) * int(heads) * int(width) * context
