"""How fast llama.cpp computes with each of ggml's types: tokens per second of one thread, prompt and generation.

    python benchmarks/type_speed.py            # minutes on one core; nothing else should run

Each file has a Llama with random weights, all layers in one type; only its shape matters. The types of each backend's
long rows are measured with rows of 1,024 and 2,816 weights, the types of short rows with rows of 1,056 and 2,848.
Medians of several runs by xllamacpp. Writes docs/results/type_speed.md.
"""

import os
from collections.abc import Mapping
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np
import torch

from _common import DATA, RESULTS, WORK, command_line, processor, table, write_report
from convert import convert
from coopq.core.types import Width
from coopq.quantizers.ggml.gptq import GGMLGPTQ
from coopq.quantizers.ggml.library import to_blocks
from coopq.quantizers.ggml.types import GGMLBackend, IQuants

FOLDER = WORK / "type_speed"
BLOCKS, HEADS = 8, 16
SHAPES = {"long": (1024, 2816), "short": (1056, 2848)}
"""Length of a state and of a state within the feed-forward part; multiples of 256, and of 32 alone."""
BACKENDS: tuple[type[GGMLBackend], ...] = (GGMLBackend, IQuants, GGMLGPTQ)
N_PROMPT, N_WRITTEN, REPEATS = 256, 64, 5


def types() -> dict[tuple[str, str], list[tuple[str, Width]]]:
    """The backends and widths that use a type, by kind of rows and type."""
    found: dict[tuple[str, str], list[tuple[str, Width]]] = {}
    for backend, kind in product(BACKENDS, SHAPES):
        own: Mapping[Width, str] = backend.long_rows if kind == "long" else backend.short_rows
        for width, ggml_type in own.items():
            found.setdefault((kind, ggml_type), []).append((backend.name, width))
    return found


def write_model(file: Path, base: gguf.GGUFReader, kind: str, ggml_type: str) -> int:
    """Write a model with all layers in a type, and the vocabulary of another; returns the bytes of the layers."""
    width, inner = SHAPES[kind]
    writer = gguf.GGUFWriter(file, "llama")
    for name, field in base.fields.items():
        if name.startswith("tokenizer."):
            types = field.types
            value = field.contents()
            writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // HEADS)
    n_tokens = len(base.fields["tokenizer.ggml.tokens"].contents())
    writer.add_vocab_size(n_tokens)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / 32

    writer.add_tensor("token_embd.weight", random(n_tokens, width).half().numpy())
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    target = gguf.GGMLQuantizationType[ggml_type]
    shapes = {f"attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    packed = {name: to_blocks(target, random(*shape), torch.ones(shape[1])).numpy() for name, shape in shapes.items()}
    for block in range(BLOCKS):  # the same weights in each block: only their places matter
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(width, np.float32))
        for name, blocks in packed.items():
            writer.add_tensor(f"blk.{block}.{name}.weight", blocks, raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return BLOCKS * sum(blocks.nbytes for blocks in packed.values())


def speeds(file: Path) -> tuple[float, float]:
    """Tokens per second of the prompt and of what is written after it, medians."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 2 * (N_PROMPT + N_WRITTEN)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    found = []
    for repeat in range(REPEATS):
        prompt = np.random.default_rng(repeat).integers(10, 1000, N_PROMPT).tolist()
        answer: Any = server.handle_completions(
            {"prompt": prompt, "max_tokens": N_WRITTEN, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        )
        found.append((answer["timings"]["prompt_per_second"], answer["timings"]["predicted_per_second"]))
    prompts, written = zip(*found, strict=True)
    return median(prompts), median(written)


def measure() -> list[str]:
    """The report."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    base = FOLDER / "base.gguf"
    if not base.exists():
        convert(DATA / "llama", base)
    reader, file, rows = gguf.GGUFReader(base), FOLDER / "model.gguf", []
    weights = {kind: BLOCKS * (4 * width * width + 3 * width * inner) for kind, (width, inner) in SHAPES.items()}
    for (kind, ggml_type), uses in types().items():
        bits = 8 * write_model(file, reader, kind, ggml_type) / weights[kind]
        prompt, written = speeds(file)
        used = ", ".join(f"{name} {width:g}" for name, width in uses)
        rows.append((kind, ggml_type, bits, prompt, written, used))
        print(kind, ggml_type, f"{bits:.2f} {prompt:.0f} {written:.1f}", flush=True)
    file.unlink()
    rows.sort(key=lambda row: (row[0], row[2]))
    shown = []
    for kind, ggml_type, bits, prompt, written, used in rows:
        faster = [row[1] for row in rows if row[0] == kind and row[2] > bits and row[4] > 1.05 * written]
        shown.append([kind, ggml_type, f"{bits:.2f}", f"{prompt:.0f}", f"{written:.1f}", ", ".join(faster), used])
    head = [
        "rows",
        "type",
        "bits per weight",
        "prompt, tokens/s",
        "generation, tokens/s",
        "larger types that are faster",
    ]
    return [
        f"Written by `python benchmarks/type_speed.py`: {processor()}, one thread, xllamacpp {version('xllamacpp')}.",
        f"A Llama of {BLOCKS} blocks, {weights['long'] / 1e6:.0f} million weights in layers, prompts of {N_PROMPT}",
        f"tokens, {N_WRITTEN} tokens written, medians of {REPEATS} runs. Faster: by more than 5 % in generation.",
        "",
        *table([*head, "backends and widths"], shown),
    ]


if __name__ == "__main__":
    command_line(__doc__).parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    write_report(RESULTS / "type_speed.md", measure())
