"""Runs a library that quantizes whole models in a process of its own.

Such libraries print banners, take over logging and set environment variables; all of that ends with the process.
"""

import json
import os
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


def end_with_parent() -> None:
    """End this worker when its parent process is gone, even if the parent was killed: nothing else stops the worker."""

    pipe = sys.stdin.fileno()

    def wait() -> None:
        # The pipe ends when its other end does. Reading from sys.stdin would hold its lock, which forks wait for.
        while os.read(pipe, 1):
            pass
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
        tokens: Calibration tokens, shape (n_sequences, length).
        job: Further entries of request.json, as plain data.
    Raises:
        BackendError: If the library fails, with the last line that it printed.
        OutputError: If the temporary folder has no room for the model and the results.
    """
    assert tokens is not None, f"{library} needs calibration tokens"
    with tempfile.TemporaryDirectory(prefix="coopq-") as place:
        folder = Path(place)
        # The results are at most as large as the model.
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
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=place
            ) as process,
        ):

            def wait_for(name: str) -> Path:
                file = folder / "out" / name
                while not file.exists():
                    if process.poll() is not None and not file.exists():
                        log.seek(0)
                        lines = [line for line in log.read().splitlines() if line.strip()]
                        raise BackendError(
                            f"{library} failed ({lines[-1] if lines else process.returncode}); it may not support this "
                            "architecture or this group size: try another group size, or another backend"
                        )
                    time.sleep(0.05)
                return file

            try:
                yield wait_for
            finally:
                process.kill()
