"""Imports libraries for `coopq doctor` in a process of its own: an import may print, hang, or end the process."""

import importlib
import json
import os
import sys


def try_import(path: str) -> tuple[str | None, str | None]:
    """Import a module, and call a function of the module if the path names one: "module" or "module:function".

    Returns:
        Version of the module if the module says one, and what went wrong, "" for a module that is not installed.
    """
    name, _, function = path.partition(":")
    try:
        module = importlib.import_module(name)
        if function:
            getattr(module, function)()
    except BaseException as error:  # noqa: BLE001  # a library may raise anything when it is imported
        lacks = error.name if isinstance(error, ModuleNotFoundError) else None
        is_missing = lacks is not None and f"{name}.".startswith(f"{lacks}.")  # the module, or a package around it
        return None, "" if is_missing else f"{type(error).__name__}: {' '.join(str(error).split())}"
    version = getattr(module, "__version__", None)
    return version.partition("-")[0] if isinstance(version, str) else None, None


def quantize_by_ggml() -> None:
    """Quantize a row by ggml, whose library is loaded for that."""
    import torch

    from coopq.quantizers.ggml.types import GGMLBackend

    GGMLBackend().quantize(torch.ones(1, 256), 4)


def main() -> None:
    """Print a line for each path of the command line: the answer as JSON."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for path in sys.argv[1:]:
        print(json.dumps(try_import(path)), file=answers, flush=True)


if __name__ == "__main__":
    main()
