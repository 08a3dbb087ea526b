"""Runs a library that quantizes whole models in a process of its own.

Such libraries print banners, take over logging and set environment variables; all of that ends with the process.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.errors import BackendError
from coopq.core.files import require_space

DONE = "done"
"""File that a worker writes last."""
_KILLED = -9
"""Exit code of a worker that the system's out-of-memory killer ended."""
_OUT_OF_MEMORY = ("OutOfMemory", "out of memory", "allocate memory")
"""What libraries print last when memory ran out."""


def end_with_parent(folder: Path) -> None:
    """End this worker and delete its folder when its parent process is gone: a killed parent does neither.

    Args:
        folder: The folder that the worker got.
    """
    pipe = sys.stdin.fileno()

    def wait() -> None:
        # The pipe ends when its other end does. Reading from sys.stdin would hold its lock, which forks wait for.
        while os.read(pipe, 1):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    if stat.S_ISFIFO(os.fstat(pipe).st_mode):  # a worker started by hand has a terminal
        threading.Thread(target=wait, daemon=True).start()


@contextmanager
def running_job(
    library: str,
    worker: str,
    model: Any,
    tokenizer: Any,
    tokens: npt.NDArray[np.int64] | None,
    job: Mapping[str, Any],
) -> Iterator[Callable[[str], Path]]:
    """Run a worker; gives a function that waits for a file of the worker's results, by name.

    Args:
        library: Name of the library, for errors.
        worker: The module to run. It gets a folder with the model and request.json, writes its results to the folder
            "out" there, and calls `end_with_parent`.
        model: The model in full precision.
        tokenizer: The model's tokenizer.
        tokens: Tokens that weights are fitted to, shape (n_sequences, length).
        job: Further entries of request.json, as plain data.
    Raises:
        BackendError: If the library fails, with the last line that it printed.
        OutputError: If the temporary folder has no room for the model and the results.
    """
    assert tokens is not None, f"{library} needs tokens to fit weights to"
    with tempfile.TemporaryDirectory(prefix="coopq-") as place:
        folder = Path(place)
        # The results are about as large as the model at most.
        n_bytes = 2 * sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        require_space(
            folder.parent, n_bytes, f"{library}'s copy of the model", "set TMPDIR to a folder on another disk"
        )
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        request = {"tokens": tokens.tolist(), "dtype": str(model.dtype).removeprefix("torch."), **job}
        request |= {"device": model.device.type}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-P", "-m", worker, place]
        with (
            (folder / "log").open("w+", encoding="utf-8", errors="replace") as log,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=place,
                env={**os.environ, **only_gpu(model.device)},
            ) as process,
        ):

            def wait_for(name: str) -> Path:
                file = folder / "out" / name
                while not file.exists():
                    if process.poll() is not None and not file.exists():
                        log.seek(0)
                        raise _failure(library, process.returncode, log.read())
                    time.sleep(0.05)
                return file

            try:
                yield wait_for
            finally:
                process.kill()


def only_gpu(device: Any) -> dict[str, str]:
    """Environment in which a worker sees no GPU but this `torch.device`: libraries take the first one, or all."""
    if device.type != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[device.index] if visible else str(device.index)}


def _failure(library: str, code: int, log: str) -> BackendError:
    """The error for a worker that ended early with an exit code, by what it printed."""
    last = next((line for line in reversed(log.splitlines()) if line.strip()), f"exit code {code}")
    more_memory = "use a device with more memory, or another backend"
    if code == _KILLED:
        return BackendError(f"{library} was ended by signal 9, probably because memory ran out; {more_memory}")
    if any(words in last for words in _OUT_OF_MEMORY):
        return BackendError(f"{library} ran out of memory ({last}); {more_memory}")
    return BackendError(
        f"{library} failed ({last}); it may not support this architecture or this group size: try another group size, "
        "or another backend"
    )
