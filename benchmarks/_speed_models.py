"""Llamas with random weights in ggml's types, and how fast llama.cpp computes with their files."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from coopq.quantizers.ggml.library import to_blocks

EMBEDDING = "token_embd.weight"
N_PROMPT, N_WRITTEN, ROUNDS = 256, 64, 5


@dataclass(frozen=True)
class Speeds:
    """Tokens per second of a file, one for each round, ascending.

    Attributes:
        prompt: Of a prompt.
        written: Of what is written after it.
    """

    prompt: list[float]
    written: list[float]


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama.

    Attributes:
        n_blocks: Number of blocks.
        width: Length of a state.
        inner: Length of a state within the feed-forward part.
        n_heads: Number of attention heads.
        n_kv_heads: Number of heads of keys and of values.
    """

    n_blocks: int
    width: int
    inner: int
    n_heads: int
    n_kv_heads: int

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each layer of a block, by ggml's name."""
        width, inner, kv = self.width, self.inner, self.width * self.n_kv_heads // self.n_heads
        shapes = {"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, width)}
        return shapes | {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}

    @property
    def n_weights(self) -> int:
        """Weights of all layers."""
        return self.n_blocks * sum(rows * columns for rows, columns in self.layers.values())


def one_type(layers: str, embedding: str) -> Mapping[str, str]:
    """The types of a model's tensors, if all layers have the same, by name."""
    return defaultdict(lambda: layers, {EMBEDDING: embedding})


def write_model(file: Path, base: gguf.GGUFReader, shape: Shape, types: Mapping[str, str]) -> int:
    """Write a model with random weights and the vocabulary of another.

    The same weights stand in each block: only their places and their types matter to speed.

    Args:
        file: What is written.
        base: The file whose tokenizer is taken.
        shape: Shape of the model.
        types: ggml's type of each layer and of the embedding, by the name of the tensor.

    Returns:
        The bytes of the layers, without the embedding.
    """
    writer = gguf.GGUFWriter(file, "llama")
    for name, field in base.fields.items():
        if name.startswith("tokenizer."):
            of_value, of_item = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), of_value, of_item)
    writer.add_block_count(shape.n_blocks)
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.n_heads)
    n_tokens = len(base.fields["tokenizer.ggml.tokens"].contents())
    writer.add_vocab_size(n_tokens)
    generator, packed, n_bytes = torch.Generator().manual_seed(0), {}, 0

    def add(name: str, rows: int, columns: int) -> int:
        kind = gguf.GGMLQuantizationType[types[name]]
        if (kind, rows, columns) not in packed:
            packed[kind, rows, columns] = _packed(kind, torch.randn(rows, columns, generator=generator) / 32)
        blocks = packed[kind, rows, columns]
        writer.add_tensor(name, blocks, raw_dtype=kind)
        return int(blocks.nbytes)

    add(EMBEDDING, n_tokens, shape.width)
    writer.add_tensor("output_norm.weight", np.ones(shape.width, np.float32))
    for block in range(shape.n_blocks):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{norm}.weight", np.ones(shape.width, np.float32))
        n_bytes += sum(add(f"blk.{block}.{name}.weight", *size) for name, size in shape.layers.items())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return n_bytes


def _packed(kind: gguf.GGMLQuantizationType, weights: torch.Tensor) -> npt.NDArray[Any]:
    if kind == gguf.GGMLQuantizationType.F16:
        return weights.half().numpy()
    return to_blocks(kind, weights, torch.ones(weights.shape[1])).numpy()


def in_turn(files: Mapping[tuple[str, str], Path]) -> dict[tuple[str, str], Speeds]:
    """Speeds of files, by one thread. All files are measured in turn, since a processor's speed drifts."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in files}
    for number in range(ROUNDS):
        for key, file in files.items():
            found[key].append(_once(file, number))
            print(number, key, *(f"{speed:.1f}" for speed in found[key][-1]), flush=True)
    return {key: Speeds(*(sorted(column) for column in zip(*rows, strict=True))) for key, rows in found.items()}


def _once(file: Path, seed: int) -> tuple[float, float]:
    """Tokens per second of a prompt and of what is written after it."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 2 * (N_PROMPT + N_WRITTEN)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    prompt = np.random.default_rng(seed).integers(10, 1000, N_PROMPT).tolist()
    answer: Any = xllamacpp.Server(parameters).handle_completions(
        {"prompt": prompt, "max_tokens": N_WRITTEN, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    )
    return answer["timings"]["prompt_per_second"], answer["timings"]["predicted_per_second"]
