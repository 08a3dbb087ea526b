"""How fast llama.cpp computes with each of ggml's types: tokens per second of one thread, prompt and generation.

    python benchmarks/type_speed.py            # minutes on one core; nothing else should run

Each file has a Llama with random weights, all layers in one type; only its shape matters. The types of each backend's
long rows are measured with rows of 1,024 and 2,816 weights, the types of short rows with rows of 1,056 and 2,848.
All files are measured in turn, several times, by xllamacpp. Writes docs/results/type_speed.md, which has a section for
each processor.
"""

import os
from collections.abc import Mapping
from importlib.metadata import version
from itertools import product
from statistics import median

import gguf

from _common import DATA, RESULTS, WORK, command_line, table, write_section
from _speed_models import N_PROMPT, N_WRITTEN, ROUNDS, Shape, in_turn, one_type, write_model
from convert import convert
from coopq.core.types import Width
from coopq.quantizers.ggml.gptq import GGMLGPTQ
from coopq.quantizers.ggml.types import GGMLBackend, IQuants

FOLDER = WORK / "type_speed"
SHAPES = {"long": Shape(8, 1024, 2816, 16, 16), "short": Shape(8, 1056, 2848, 16, 16)}
"""Rows are multiples of 256 weights, and of 32 alone."""
BACKENDS: tuple[type[GGMLBackend], ...] = (GGMLBackend, IQuants, GGMLGPTQ)


def types() -> dict[tuple[str, str], list[tuple[str, Width]]]:
    """The backends and widths that use a type, by kind of rows and type."""
    found: dict[tuple[str, str], list[tuple[str, Width]]] = {}
    for backend, kind in product(BACKENDS, SHAPES):
        own: Mapping[Width, str] = backend.long_rows if kind == "long" else backend.short_rows
        for width, ggml_type in own.items():
            found.setdefault((kind, ggml_type), []).append((backend.name, width))
    return found


def measure() -> list[str]:
    """The section of this processor."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    base = FOLDER / "base.gguf"
    if not base.exists():
        convert(DATA / "llama", base)
    reader, used, files, bits = gguf.GGUFReader(base), types(), {}, {}
    for kind, ggml_type in used:
        file = FOLDER / f"{kind}-{ggml_type}.gguf"
        n_bytes = write_model(file, reader, SHAPES[kind], one_type(ggml_type, "F16"))
        files[kind, ggml_type], bits[kind, ggml_type] = file, 8 * n_bytes / SHAPES[kind].n_weights
    found, rows = in_turn(files), []
    written = {key: median(speeds.written) for key, speeds in found.items()}
    for key in sorted(files, key=lambda key: (key[0], bits[key])):
        larger = (other for other in files if other[0] == key[0] and bits[other] > bits[key])
        faster = [other[1] for other in larger if written[other] > 1.05 * written[key]]
        cells = [*key, f"{bits[key]:.2f}", f"{median(found[key].prompt):.0f}", f"{written[key]:.1f}", ", ".join(faster)]
        rows.append([*cells, ", ".join(f"{name} {width:g}" for name, width in used[key])])
        files[key].unlink()
    columns = ["rows", "type", "bits per weight", "prompt, tokens/s", "generation, tokens/s"]
    return table([*columns, "larger types that are faster", "backends and widths"], rows)


def main() -> None:
    """Measure all types, and write the section of this processor."""
    command_line(__doc__).parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    section, long = measure(), SHAPES["long"]
    above = [
        f"Written by `python benchmarks/type_speed.py`: one thread, xllamacpp {version('xllamacpp')}.",
        f"A Llama of {long.n_blocks} blocks, {long.n_weights / 1e6:.0f} million weights in layers, prompts of",
        f"{N_PROMPT} tokens, {N_WRITTEN} tokens written, medians of {ROUNDS} runs. Faster: by more than 5 % in",
        "generation.",
    ]
    write_section(RESULTS / "type_speed.md", above, section)


if __name__ == "__main__":
    main()
