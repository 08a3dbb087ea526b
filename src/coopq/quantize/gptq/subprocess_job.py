"""Libraries that quantize whole models, each in a process of its own.

They print banners, take over logging and set environment variables; all of that ends with the process.
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

DONE = "done"
"""File that says that all is made."""


def end_with_parent() -> None:
    """Let a worker end when the process that wants its work is gone, however that was killed: nobody else stops it."""

    pipe = sys.stdin.fileno()

    def wait() -> None:
        while os.read(pipe, 1):  # it ends when its other end does; sys.stdin itself would be locked for forks
            pass
        os._exit(1)

    if stat.S_ISFIFO(os.fstat(pipe).st_mode):  # by hand it is something else
        threading.Thread(target=wait, daemon=True).start()


@contextmanager
def working(
    library: str,
    worker: str,
    model: Any,
    tokenizer: Any,
    tokens: npt.NDArray[np.int64] | None,
    job: Mapping[str, Any],
) -> Iterator[Callable[[str], Path]]:
    """A library at a job: a function that waits for a file that it makes, by name.

    Args:
        library: Its name, for errors.
        worker: The module to run; it finds the model and request.json in the folder that it is given, makes files in
            the folder "out" there, and calls `end_with_parent`.
        model: The model, in full precision.
        tokenizer: Its tokenizer.
        tokens: Calibration tokens, shape (n_sequences, length).
        job: What else the worker is to know, as plain data.
    Raises:
        BackendError: If the library fails, with its last words.
    """
    assert tokens is not None, f"{library} needs calibration tokens"
    with tempfile.TemporaryDirectory(prefix="coopq-") as place:
        folder = Path(place)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        request = {"tokens": tokens.tolist(), "dtype": str(model.dtype).removeprefix("torch."), **job}
        request |= {"device": model.device.type}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", worker, place]
        with (
            (folder / "log").open("w+", encoding="utf-8", errors="replace") as log,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, cwd=place
            ) as process,
        ):

            def made(name: str) -> Path:
                file = folder / "out" / name
                while not file.exists():
                    if process.poll() is not None and not file.exists():
                        log.seek(0)
                        words = [line for line in log.read().splitlines() if line.strip()]
                        raise BackendError(
                            f"{library} failed ({words[-1] if words else process.returncode}); it may lack this "
                            "architecture or this group size: try another one, or another backend"
                        )
                    time.sleep(0.05)
                return file

            try:
                yield made
            finally:
                process.kill()
