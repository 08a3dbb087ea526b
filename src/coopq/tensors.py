"""Tensors in safetensors files, with errors that say what to do."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coopq.errors import OutputError


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors that are contiguous, marked as PyTorch's, which other loaders insist on.

    Raises:
        OutputError: If the file cannot be written whole.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OutputError(
            f"cannot write {path} ({error}); make room and run the same command again: nothing computed is lost"
        ) from error
    path.chmod(0o644)  # safetensors leaves it to its owner alone


def load_tensors(path: Path, device: str = "cpu", *, way_out: str) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Args:
        path: The file.
        device: Where the tensors go.
        way_out: What a user should do about a damaged file.
    Raises:
        OutputError: If the file is damaged.
    """
    try:
        return load_file(path, device=device)
    except (SafetensorError, FileNotFoundError) as error:
        raise OutputError(f"{path} is damaged or missing ({error}); {way_out}") from error
