"""The forms that engines load, in one table: checks, help texts and tables are made from the table.

A form's module is imported when the form is asked for, so this module imports no torch.
"""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from coopq.core.errors import ExportError, hint
from coopq.core.files import expanded, require_no_input
from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import Player, ProgressCallback, silent
from coopq.export.kv_cache import cache_bytes
from coopq.plan.plan import Plan
from coopq.quantizers.sizes import OUR_FILE, Target

if TYPE_CHECKING:  # these import torch
    from coopq.export.base_model import BaseModel
    from coopq.export.checkpoint import SavedModel
    from coopq.quantizers.backend import Backend


class FormEntry(NamedTuple):
    """A line of the table of forms.

    Attributes:
        path: Module and class, "module:class".
        engine: What loads the form.
        summary: What the form is for, in a clause.
        backends: Names of the backends whose weights the form can hold; `Form.check` also looks at their options.
        takes_base: Whether the form starts from the model in full precision, `--base` and `--model`.
    """

    path: str
    engine: str
    summary: str
    backends: tuple[str, ...]
    takes_base: bool = False


_GPTQ_TENSORS = ("gptq", "gptq-static", "autoround")

FORMS: dict[str, FormEntry] = {
    "gguf": FormEntry(
        "coopq.export.gguf.form:GGUF",
        "llama.cpp",
        "one file for llama.cpp and everything that is built on llama.cpp",
        ("ggml", "ggml-iq", "ggml-gptq"),
        takes_base=True,
    ),
    "openvino": FormEntry(
        "coopq.export.folders.openvino:OpenVINO",
        "OpenVINO",
        "a folder for CPUs, GPUs and NPUs of Intel; embeddings can be quantized too",
        ("rtn", "quanto", "hqq", *_GPTQ_TENSORS),
        takes_base=True,
    ),
    "mlx": FormEntry(
        "coopq.export.folders.mlx:MLX",
        "mlx-lm",
        "a folder for Macs, with a width for each layer; embeddings can be quantized too",
        ("rtn", "hqq", *_GPTQ_TENSORS),
    ),
    "compressed-tensors": FormEntry(
        "coopq.export.folders.compressed_tensors:CompressedTensors",
        "vLLM, transformers",
        "a folder for servers; layers that vLLM fuses need one width",
        _GPTQ_TENSORS,
    ),
    "auto-round": FormEntry(
        "coopq.export.folders.auto_round:AutoRound",
        "transformers",
        "a folder for transformers, with a width for each layer",
        _GPTQ_TENSORS,
    ),
}


class Form(Protocol):
    """How saved models become what an engine loads. Sizes are known before anything is written."""

    def check(self, backend: "Backend") -> None:
        """Check that the form can hold what a backend makes.

        Raises:
            ExportError: If not.
        """
        ...

    def require_engine(self) -> None:
        """Check that the packages which writing needs are installed: none, unless a form says otherwise.

        Raises:
            ExportError: If not, with the command that installs them.
        """

    def held_players(self, request: Request, players: Sequence[Player], progress: ProgressCallback) -> Sequence[Player]:
        """The players, without layers that the form cannot hold quantized: all of them, unless a form says otherwise.

        Args:
            request: What is asked for; `request.target.form` is this form.
            players: All players, by block.
            progress: Told of every step, as a base may have to be made.
        Raises:
            ExportError: If the form cannot hold the model.
        """
        return players

    def check_model(self, request: Request, model: Any, players: Sequence[Player], progress: ProgressCallback) -> None:
        """Check that the base that a request names has the weights of a model: nothing, for forms without a base.

        Args:
            request: What is asked for; `request.target.form` is this form.
            model: The model.
            players: The players that the form holds.
            progress: Told of every step.
        Raises:
            ExportError: If the base lacks a weight of the model.
            Mismatch: If the base is of another model.
        """

    def player_sizes(
        self, packed: Sizes, request: Request, skeleton: Any, players: Sequence[Player], backend: "Backend"
    ) -> Sizes:
        """Sizes of players in a file of this form, with the bytes beside the players in `fixed`.

        Args:
            packed: Sizes as coopq itself saves the players.
            request: What is asked for; `request.target.form` is this form.
            skeleton: The model without storage.
            players: The players, by block.
            backend: What quantizes; it passed `check`.
        Raises:
            ExportError: If the form cannot hold the model.
        """
        ...

    def file_bytes(self, plan: Plan, backend: "Backend", base: "BaseModel") -> int:
        """Bytes of the file that holds the weights of a plan.

        Args:
            plan: The plan.
            backend: What makes the plan's weights; it passed `check`.
            base: The plan's model in full precision.
        Raises:
            ExportError: If the form cannot hold the model.
        """
        ...

    def write(self, saved: "SavedModel", out: Path, base: "BaseModel", progress: ProgressCallback) -> int:
        """Write a saved model in this form; `out` appears whole or not at all.

        Args:
            saved: The saved model; its backend passed `check`.
            out: The file or the folder to write.
            base: The model in full precision.
            progress: Told of every step.
        Returns:
            Bytes of the file that holds the weights, as `file_bytes` predicts them.
        Raises:
            ExportError: If the form cannot hold the model, or the base is missing.
            Mismatch: If the base is another model.
        """
        ...


def get_form(name: str) -> Form:
    """The form of a name.

    Raises:
        ExportError: If the name is unknown.
    """
    if name not in FORMS:
        raise ExportError(f"form {name!r} is unknown; {hint(name, FORMS)}")
    module, _, attribute = FORMS[name].path.partition(":")
    form: Form = getattr(importlib.import_module(module), attribute)()
    return form


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
        form: A name of `FORMS`.
        out: The file to write, or for most forms the folder.
        base: For forms with `takes_base`: the model in full precision in that form; llama.cpp's converter makes one
            for gguf if none is named.
        model: For forms with `takes_base`: where the plan's model is now.
        progress: Told of every step.
    Returns:
        Bytes of the file that holds the weights.
    Raises:
        ExportError: If the form is unknown, or cannot hold the model.
        OutputError: If `out` is, lies in, or contains what the export reads.
    """
    from coopq.export.base_model import BaseModel
    from coopq.export.checkpoint import SavedModel

    saved, out = expanded(saved), expanded(out)
    base = None if base is None else expanded(base)
    chosen, source = get_form(form), SavedModel(saved)
    if not (base is None and model is None):
        _require_takes_base(form)
    chosen.check(source.backend)
    chosen.require_engine()
    start = BaseModel.find(source.plan.request, base, model)
    require_no_input(out, [saved, expanded(start.source), *([] if start.path is None else [start.path])])
    return chosen.write(source, out, start, progress)


def _require_takes_base(form: str) -> None:
    """Refuse a base for a form that needs none."""
    if not FORMS[form].takes_base:
        takers = " and ".join(name for name, entry in FORMS.items() if entry.takes_base)
        raise ExportError(f"--base and --model are for {takers}; {form} needs the saved model only")


def predicted_bytes(plan: Plan, form: str, *, base: Path | None = None, model: str | None = None) -> int:
    """Bytes of the file that holds the weights of a plan in the form of an engine, before the file is written.

    Args and errors: as for `export_model`.
    """
    from coopq.export.base_model import BaseModel
    from coopq.quantizers.packed_modules import PackedWeights

    chosen, backend = get_form(form), PackedWeights(plan.quantizer).backend
    chosen.check(backend)
    return chosen.file_bytes(plan, backend, BaseModel.find(plan.request, base, model))


class TargetFile(Target):
    """The file of a request's target; without a target, what coopq itself saves.

    Args:
        progress: Told of every step, as a base may have to be made.
    """

    def __init__(self, progress: ProgressCallback = silent) -> None:
        self._progress = progress

    def fit(
        self, request: Request, skeleton: Any, players: Sequence[Player], backend: "Backend"
    ) -> tuple[Sequence[Player], Sizes]:
        """See `Target.fit`."""
        if request.target.form is not None:
            form = get_form(request.target.form)
            if request.target.base is not None:
                _require_takes_base(request.target.form)
            form.check(backend)
            OUR_FILE.fit(request, skeleton, players, backend)  # refuses rows that the backend has no type for
            players = form.held_players(request, players, self._progress)
        return players, target_sizes(request, skeleton, players, backend)

    def check(self, request: Request, model: Any, players: Sequence[Player], progress: ProgressCallback) -> None:
        """See `Target.check`."""
        if request.target.form is not None:
            get_form(request.target.form).check_model(request, model, players, progress)


def target_sizes(request: Request, skeleton: Any, players: Sequence[Player], backend: "Backend") -> Sizes:
    """Sizes of players in the file of a request's target, and the bytes that budgets have to hold beside the players.

    Args:
        request: What is asked for; without a target, sizes are those of a model that coopq saves.
        skeleton: The model, or the model without storage.
        players: The players, by block.
        backend: What quantizes.
    Raises:
        BackendError: If the backend cannot quantize a layer.
        ExportError: If the target is unknown, or cannot hold what the backend makes of the model.
    """
    from coopq.export.folders.stored_tensors import bytes_beside
    from coopq.model.load import checkpoint_dtype

    target, (_, sizes) = request.target, OUR_FILE.fit(request, skeleton, players, backend)
    if target.form is not None:
        sizes = get_form(target.form).player_sizes(sizes, request, skeleton, players, backend)
    else:
        sizes = replace(sizes, fixed=bytes_beside(skeleton, players, checkpoint_dtype(request.model.source)))
    if target.context is not None:
        sizes = replace(sizes, reserved=cache_bytes(skeleton, target.context))
    return sizes
