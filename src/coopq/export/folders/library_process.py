"""Runs a library in a process of its own: some libraries change logging or limits of the process that imports them."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def answer_of(module: str, request: Mapping[str, Any]) -> Any:
    """The answer of a program to a request.

    Args:
        module: Name of the program's module. The program reads the request as JSON from the standard input, and prints
            the answer as JSON in the last line.
        request: Plain data.
    Raises:
        RuntimeError: If the program fails, with the last line that it printed.
    """
    # -P: Python imports nothing from the current folder, which may be a stranger's model.
    command = [sys.executable, "-P", "-m", module]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["its process died"])[-1])
    return json.loads(done.stdout.splitlines()[-1])
