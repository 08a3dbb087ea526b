"""Saved models in the forms that engines load: one file for each form."""

from pathlib import Path

from coopq.errors import ExportError, hint
from coopq.types import ProgressCallback, silent

FORMS = ("gguf", "compressed-tensors")


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
        out: The file, or for "compressed-tensors" the folder.
        base: For "gguf": see `coopq.export.gguf.export_gguf`; so is `model`.
        model: Where the plan's model is now.
        progress: Told of every step.
    Returns:
        Bytes of the file that holds the weights.
    Raises:
        ExportError: If the form is unknown, or cannot hold the model.
    """
    if form == "gguf":
        from coopq.export.gguf import export_gguf

        return export_gguf(saved, out, base=base, model=model, progress=progress)
    if form == "compressed-tensors":
        if base is not None or model is not None:
            raise ExportError("--base and --model are for gguf; compressed-tensors takes all from the saved model")
        from coopq.export.compressed_tensors import export_compressed_tensors

        return export_compressed_tensors(saved, out, progress=progress)
    raise ExportError(f"form {form!r} is unknown; {hint(form, FORMS)}")
